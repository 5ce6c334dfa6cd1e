/*
 * decode: finds what a prefill server saved of a prompt, loads it into pages of its own, verifies every byte.
 *
 *   gcc -std=c11 -O2 decode.c -o decode -lucm && ./decode --directory /mnt/kv --model qwen2.5-7b
 */

#include "kv_cache.h"

int main(int count, char **words) {
    const arguments_t arguments = parse(count, words);
    const model_t *model = &arguments.model;

    ucm_store_t *stores[RANKS_MAX];
    for (size_t rank = 0; rank < model->ranks; ++rank) stores[rank] = open_store(&arguments, rank, 0);
    /* A scheduler looks up and transfers nothing. It says yes only where all parts of a block are there. */
    ucm_store_t *scheduler = open_store(&arguments, 0, -1);

    size_t block_count = 0, hits = 0;
    ucm_block_id_t *blocks = hash_prompt(&arguments, scheduler, &block_count);
    check(ucm_lookup_prefix(scheduler, blocks, block_count, &hits), "lookup");
    printf("decode %s: prompt %" PRIu64 " hits %zu of %zu blocks\n", model->name, arguments.prompt, hits,
           block_count);
    expect_hits(&arguments, hits);

    size_t wrong = 0;
    if (hits > 0) {
        paged_kv_t memories[RANKS_MAX];
        ucm_task_t *tasks[RANKS_MAX];
        /* Other page numbers than prefill had: the last page first. */
        size_t *page_of = allocate(hits, sizeof *page_of);
        for (size_t i = 0; i < hits; ++i) page_of[i] = hits - 1 - i;
        for (size_t rank = 0; rank < model->ranks; ++rank) memories[rank] = new_pages(model, rank, hits);

        const double start = now();
        for (size_t rank = 0; rank < model->ranks; ++rank) {
            tasks[rank] = submit(ucm_load, stores[rank], &memories[rank], blocks, hits, page_of);
        }
        for (size_t rank = 0; rank < model->ranks; ++rank) wait_for(tasks[rank], UCM_STAGE_LOADED);
        report("loaded", hits, model, now() - start);

        for (size_t rank = 0; rank < model->ranks; ++rank) {
            for (size_t i = 0; i < hits; ++i) wrong += !each_word(&memories[rank], page_of[i], &blocks[i], 0);
            ucm_task_free(tasks[rank]);
            free(memories[rank].base);
        }
        free(page_of);
        if (wrong > 0) printf("  %zu block parts have WRONG BYTES\n", wrong);
        else printf("  verified every byte of %zu blocks\n", hits);
    }

    ucm_store_close(scheduler);
    for (size_t rank = 0; rank < model->ranks; ++rank) ucm_store_close(stores[rank]);
    free(blocks);
    return wrong > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
