/* Goal: every thread that the library starts blocks all signals, so that handlers run on the program's own threads
 * only; and calls that wait go on when a signal interrupts them. */
#define _GNU_SOURCE
#include "check.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

static volatile sig_atomic_t alarms, strays;
static pthread_t main_thread;

static void count(int signal) {
    (void)signal;
    ++alarms;
    if (!pthread_equal(pthread_self(), main_thread)) ++strays;
}

/* Signals that a host program may have handlers for. */
static unsigned long long wanted(void) {
    static const int signals[] = {SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGPIPE, SIGALRM, SIGTERM, SIGCHLD};
    unsigned long long mask = 0;
    for (size_t i = 0; i < sizeof signals / sizeof *signals; ++i) mask |= 1ull << (signals[i] - 1);
    return mask;
}

/* Looks at every other thread of the process; returns how many are the library's. */
static int threads_block_signals(void) {
    DIR *tasks = opendir("/proc/self/task");
    int seen = 0;
    CHECK(tasks != NULL);
    for (struct dirent *entry; (entry = readdir(tasks)) != NULL;) {
        char path[300], line[256], name[64] = "";
        unsigned long long blocked = 0;
        FILE *status;
        if (entry->d_name[0] == '.' || atoi(entry->d_name) == (int)getpid()) continue;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
        status = fopen(path, "r");
        if (status == NULL) continue; /* it has just ended */
        while (fgets(line, sizeof line, status) != NULL) {
            sscanf(line, "Name: %63s", name);
            sscanf(line, "SigBlk: %llx", &blocked);
        }
        fclose(status);
        if (strncmp(name, "ucm-", 4) != 0) continue; /* a sanitizer's, or gone */
        if ((blocked & wanted()) != wanted()) {
            fprintf(stderr, "thread %s blocks only %llx\n", name, blocked);
            exit(1);
        }
        ++seen;
    }
    closedir(tasks);
    return seen;
}

int main(void) {
    ucm_store_t *store = test_store(BLOCK_BYTES);
    struct sigaction action;
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    sigset_t before, after;
    main_thread = pthread_self();
    memset(&action, 0, sizeof action);
    action.sa_handler = count; /* without SA_RESTART */
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &before) == 0);
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    for (unsigned number = 0; number < 20 || alarms < 20; ++number) {
        save_block(store, number);
        OK(load_block(store, number));
        OK(ucm_store_refresh(store, -1));
    }
    CHECK(threads_block_signals() >= 3); /* copies, I/O, deadlines */
    ucm_store_close(store);
    store = test_store(BLOCK_BYTES); /* opening under signals */
    OK(load_block(store, 0));
    ucm_store_close(store);
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    CHECK(strays == 0);
    /* The program's own thread has the mask it had. */
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &after) == 0);
    for (int number = 1; number < 32; ++number) CHECK(sigismember(&before, number) == sigismember(&after, number));
    return passed();
}
