/*
 * prefill: computes the KV of a prompt in paged memory and saves it.
 *
 *   gcc -std=c11 -O2 prefill.c -o prefill -lucm && ./prefill --directory /mnt/kv --model qwen2.5-7b
 */

#include "kv_cache.h"

int main(int count, char **words) {
    const arguments_t arguments = parse(count, words);
    const model_t *model = &arguments.model;

    /* One store for each rank; in a server each of them is a process of its own. */
    ucm_store_t *stores[RANKS_MAX];
    for (size_t rank = 0; rank < model->ranks; ++rank) stores[rank] = open_store(&arguments, rank, 0);

    size_t block_count = 0, hits = 0;
    ucm_block_id_t *blocks = hash_prompt(&arguments, stores[0], &block_count);
    check(ucm_store_refresh(stores[0], 0), "refresh");
    check(ucm_lookup_prefix(stores[0], blocks, block_count, &hits), "lookup");
    printf("prefill %s: prompt %" PRIu64 " has %zu blocks; %zu are stored already\n", model->name,
           arguments.prompt, block_count, hits);
    expect_hits(&arguments, hits);

    /* The rest is computed, block hits + i on page i, and saved. */
    const size_t missing = block_count - hits;
    if (missing > 0) {
        paged_kv_t memories[RANKS_MAX];
        ucm_task_t *tasks[RANKS_MAX];
        size_t *page_of = allocate(missing, sizeof *page_of);
        for (size_t i = 0; i < missing; ++i) page_of[i] = i;
        for (size_t rank = 0; rank < model->ranks; ++rank) {
            memories[rank] = new_pages(model, rank, missing);
            for (size_t i = 0; i < missing; ++i) each_word(&memories[rank], i, &blocks[hits + i], 1);
        }

        const double start = now();
        for (size_t rank = 0; rank < model->ranks; ++rank) {
            tasks[rank] = submit(ucm_save, stores[rank], &memories[rank], blocks + hits, missing, page_of);
        }
        /* PERSISTED: any other process can load the blocks. */
        for (size_t rank = 0; rank < model->ranks; ++rank) wait_for(tasks[rank], UCM_STAGE_PERSISTED);
        report("saved", missing, model, now() - start);

        for (size_t rank = 0; rank < model->ranks; ++rank) {
            ucm_task_free(tasks[rank]);
            free(memories[rank].base);
        }
        free(page_of);
    }

    for (size_t rank = 0; rank < model->ranks; ++rank) ucm_store_close(stores[rank]);
    free(blocks);
    return EXIT_SUCCESS;
}
