/* faulty_files.c: makes a program's file transfers below one directory fail or take long, on request.
 *
 * Loaded with LD_PRELOAD. UCM_FAULT_DIRECTORY is the directory; the file that UCM_FAULT_SWITCH names holds
 * one word: "read-error" (EIO), "write-error" (EIO), "gone" (both), "disk-full" (ENOSPC on writes), "slow-read" (each
 * read takes SLOW_READ_MS longer), anything else: no fault. It is read at every transfer, so that a test
 * changes it while the program runs. Reaches plain system calls only: io_engine must be psync.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SLOW_READ_MS = 7000, WORD = 32, PATH_BYTES = 4096 };

/* The word in the switch file; empty where there is none. */
static void fault(char word[WORD])
{
    const char *name = getenv("UCM_FAULT_SWITCH");
    word[0] = 0;
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    ssize_t length = read(file, word, WORD - 1);
    close(file);
    word[length > 0 ? length : 0] = 0;
    word[strcspn(word, "\n")] = 0;
}

/* Whether a descriptor's file lies below the directory. */
static int is_below(int descriptor)
{
    const char *directory = getenv("UCM_FAULT_DIRECTORY");
    char link[64], path[PATH_BYTES];
    if (!directory)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strncmp(path, directory, strlen(directory)) == 0;
}

static int fails(int descriptor, int writes)
{
    char word[WORD];
    if (!is_below(descriptor))
        return 0;
    fault(word);
    if (!writes && strcmp(word, "slow-read") == 0)
        usleep(SLOW_READ_MS * 1000);
    if (writes && strcmp(word, "disk-full") == 0)
        errno = ENOSPC;
    else if (strcmp(word, "gone") == 0 || strcmp(word, writes ? "write-error" : "read-error") == 0)
        errno = EIO;
    else
        return 0;
    return 1;
}

#define WRAP(name, writes, parameters, arguments)                                                                     \
    ssize_t name parameters                                                                                           \
    {                                                                                                                  \
        ssize_t(*real) parameters = (ssize_t(*) parameters)dlsym(RTLD_NEXT, #name);                                    \
        return fails(descriptor, writes) ? -1 : real arguments;                                                        \
    }

WRAP(pread64, 0, (int descriptor, void *to, size_t length, off64_t offset), (descriptor, to, length, offset))
WRAP(pwrite64, 1, (int descriptor, const void *from, size_t length, off64_t offset), (descriptor, from, length, offset))
WRAP(preadv, 0, (int descriptor, const struct iovec *to, int count, off_t offset), (descriptor, to, count, offset))
WRAP(pwritev, 1, (int descriptor, const struct iovec *from, int count, off_t offset), (descriptor, from, count, offset))
