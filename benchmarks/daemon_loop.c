// The least that a daemon's lanes can do: the same calls of the driver, the same reads of the same
// files and the same sleeps, and nothing kept. No parsing, no ring, no counters. A thread each for
// the driver and the files, or one for both.
//
//     daemon_loop [--one] PERIOD_NS SECONDS LIBRARY FILE...      PERIOD_NS 0: reads without sleeping
//
// Prints, for the driver (with --one: nothing) and for the files: samples, and CPU time of the loop (ns).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

// What is called of NVML, as nvml.h has it; the loop builds without that header.
typedef struct {
    unsigned gpu, memory;
} Utilisation;
typedef struct {
    unsigned long long total, free, used;
} Memory;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency_us;
    unsigned type;
    int status;
    unsigned long long value;
} Field;
enum { kPowerInstant = 186, kPowerAverage = 185, kMostGpus = 64 };

static const long long kNsPerS = 1000000000LL;
static long long period_ns, duration_ns;

typedef struct {
    const char* library;
    int files, *fds;
    long long samples, cpu_ns;
} Lane;

static int (*count_gpus)(unsigned*), (*get_gpu)(unsigned, void**);
static int (*energy)(void*, unsigned long long*), (*utilisation)(void*, Utilisation*);
static int (*memory)(void*, Memory*), (*fields)(void*, int, Field*);

static long long read_clock_ns(clockid_t clock) {
    struct timespec ts;
    clock_gettime(clock, &ts);
    return (long long)ts.tv_sec * kNsPerS + ts.tv_nsec;
}

static void* symbol(void* library, const char* name) {
    void* const found = dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "no %s\n", name);
        exit(1);
    }
    return found;
}

static unsigned open_driver(const char* path, void** gpus) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    int (*const init)(void) = (int (*)(void))symbol(library, "nvmlInit_v2");
    count_gpus = (int (*)(unsigned*))symbol(library, "nvmlDeviceGetCount_v2");
    get_gpu = (int (*)(unsigned, void**))symbol(library, "nvmlDeviceGetHandleByIndex_v2");
    energy =
        (int (*)(void*, unsigned long long*))symbol(library, "nvmlDeviceGetTotalEnergyConsumption");
    utilisation = (int (*)(void*, Utilisation*))symbol(library, "nvmlDeviceGetUtilizationRates");
    memory = (int (*)(void*, Memory*))symbol(library, "nvmlDeviceGetMemoryInfo");
    fields = (int (*)(void*, int, Field*))symbol(library, "nvmlDeviceGetFieldValues");
    unsigned count = 0;
    if (init() != 0 || count_gpus(&count) != 0 || count > kMostGpus) exit(1);
    for (unsigned gpu = 0; gpu < count; ++gpu)
        if (get_gpu(gpu, &gpus[gpu]) != 0) exit(1);
    return count;
}

static void* run(void* argument) {
    Lane* const lane = argument;
    void* gpus[kMostGpus];
    const unsigned count = lane->library != NULL ? open_driver(lane->library, gpus) : 0;
    prctl(PR_SET_TIMERSLACK, 1);
    const long long begin_ns = read_clock_ns(CLOCK_MONOTONIC);
    const long long cpu_ns = read_clock_ns(CLOCK_THREAD_CPUTIME_ID);
    long long deadline_ns = begin_ns, now_ns;
    while ((now_ns = read_clock_ns(CLOCK_MONOTONIC)) < begin_ns + duration_ns) {
        ++lane->samples;
        for (unsigned gpu = 0; gpu < count; ++gpu) {
            unsigned long long mj;
            Utilisation rates;
            Memory used;
            Field power[2] = {{.field = kPowerInstant}, {.field = kPowerAverage}};
            if (energy(gpus[gpu], &mj) != 0 || utilisation(gpus[gpu], &rates) != 0 ||
                memory(gpus[gpu], &used) != 0 || fields(gpus[gpu], 2, power) != 0)
                exit(1);
        }
        for (int i = 0; i < lane->files; ++i) {
            char text[32];
            if (pread(lane->fds[i], text, sizeof text - 1, 0) <= 0) exit(1);
        }
        if (period_ns == 0) continue;
        do deadline_ns += period_ns;
        while (deadline_ns <= now_ns);
        const struct timespec until = {deadline_ns / kNsPerS, deadline_ns % kNsPerS};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    }
    lane->cpu_ns = read_clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu_ns;
    return NULL;
}

int main(int argc, char** argv) {
    const int one = argc > 1 && strcmp(argv[1], "--one") == 0;
    argc -= one;
    argv += one;
    if (argc < 5) return 2;
    period_ns = atoll(argv[1]);
    duration_ns = (long long)(atof(argv[2]) * 1e9);
    Lane driver = {.library = argv[3]}, counters = {.files = argc - 4};
    counters.fds = calloc((size_t)counters.files, sizeof *counters.fds);
    if (counters.fds == NULL) return 1;
    for (int i = 0; i < counters.files; ++i)
        if ((counters.fds[i] = open(argv[i + 4], O_RDONLY | O_CLOEXEC)) < 0) return 1;
    if (one) {
        counters.library = driver.library;
        run(&counters);
    } else {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run, &driver) != 0) return 1;
        run(&counters);
        pthread_join(thread, NULL);
    }
    printf("%lld %lld %lld %lld\n", driver.samples, driver.cpu_ns, counters.samples,
           counters.cpu_ns);
    return 0;
}
