// The least that a sampler can do: the same reads and the same sleeps, and nothing kept but the
// lateness. No parsing, no ring, no counters.
//
//     sampler_loop PERIOD_NS SECONDS FILE...      PERIOD_NS 0: reads without sleeping
//     sampler_loop PERIOD_NS SECONDS              only wakes up
//     sampler_loop PERIOD_NS SECONDS nvml:LIBRARY [FILE]...   built with -DWITH_NVML: of each GPU,
//                                                             what the product reads of an H100,
//                                                             all but its energy 5 times a second
//
// Prints: samples, their CPU time (ns), the time that they took (ns), lateness p50 and p99 beyond
// the least (ns). Two more samples come before, in which all is touched for the first time.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_NVML
#include <dlfcn.h>
#include <nvml.h>

static __typeof__(&nvmlDeviceGetTotalEnergyConsumption) energy;
static __typeof__(&nvmlDeviceGetUtilizationRates) utilisation;
static __typeof__(&nvmlDeviceGetMemoryInfo) memory;
static __typeof__(&nvmlDeviceGetFieldValues) fields;
static nvmlDevice_t boards[1024];
static unsigned count;

static int open_nvml(const char* path) {
    void* const library = dlopen(path, RTLD_NOW);
    if (library == NULL) return 0;
    *(void**)&energy = dlsym(library, "nvmlDeviceGetTotalEnergyConsumption");
    *(void**)&utilisation = dlsym(library, "nvmlDeviceGetUtilizationRates");
    *(void**)&memory = dlsym(library, "nvmlDeviceGetMemoryInfo");
    *(void**)&fields = dlsym(library, "nvmlDeviceGetFieldValues");
    nvmlReturn_t (*init)(void), (*how_many)(unsigned*), (*by_index)(unsigned, nvmlDevice_t*);
    *(void**)&init = dlsym(library, "nvmlInit_v2");
    *(void**)&how_many = dlsym(library, "nvmlDeviceGetCount_v2");
    *(void**)&by_index = dlsym(library, "nvmlDeviceGetHandleByIndex_v2");
    if (init() != NVML_SUCCESS || how_many(&count) != NVML_SUCCESS || count > 1024) return 0;
    for (unsigned i = 0; i < count; ++i)
        if (by_index(i, &boards[i]) != NVML_SUCCESS) return 0;
    return 1;
}

static int read_nvml(int all) {
    for (unsigned i = 0; i < count; ++i) {
        unsigned long long mj;
        if (energy(boards[i], &mj) != NVML_SUCCESS) return 0;
        if (!all) continue;
        nvmlUtilization_t rates;
        nvmlMemory_t bytes;
        nvmlFieldValue_t powers[2];
        memset(powers, 0, sizeof powers);
        powers[0].fieldId = NVML_FI_DEV_POWER_INSTANT;
        powers[1].fieldId = NVML_FI_DEV_POWER_AVERAGE;
        if (utilisation(boards[i], &rates) != NVML_SUCCESS ||
            memory(boards[i], &bytes) != NVML_SUCCESS ||
            fields(boards[i], 2, powers) != NVML_SUCCESS)
            return 0;
    }
    return 1;
}
#else
static const unsigned count = 0;
static int open_nvml(const char* path) { return path == NULL; }
static int read_nvml(int all) {
    (void)all;
    return 0;
}
#endif

static const long long kNsPerS = 1000000000LL, kGaugesNs = 200000000LL;
static const size_t kMost = 1 << 20, kFirst = 2;

static long long read_clock_ns(clockid_t clock) {
    struct timespec ts;
    clock_gettime(clock, &ts);
    return (long long)ts.tv_sec * kNsPerS + ts.tv_nsec;
}

static int ascending(const void* a, const void* b) {
    const long long x = *(const long long*)a, y = *(const long long*)b;
    return (x > y) - (x < y);
}

int main(int argc, char** argv) {
    if (argc < 3) return 2;
    const long long period_ns = atoll(argv[1]);
    const char* const kind = "nvml:";
    const int gpus = argc > 3 && strncmp(argv[3], kind, strlen(kind)) == 0;
    const int first = gpus ? 4 : 3, files = argc - first;
    int* const fds = calloc((size_t)argc, sizeof *fds);
    if (gpus && !open_nvml(argv[3] + strlen(kind))) return 1;
    const double periods = period_ns > 0 ? atof(argv[2]) * 1e9 / (double)period_ns : (double)kMost;
    const size_t most = kFirst + (periods < (double)kMost ? (size_t)periods + 1 : kMost);
    long long* const late_ns = malloc(most * sizeof *late_ns);
    if (fds == NULL || late_ns == NULL) return 1;
    for (size_t i = 0; i < most; ++i) late_ns[i] = 0;  // pages are touched before the loop
    for (int i = 0; i < files; ++i)
        if ((fds[i] = open(argv[i + first], O_RDONLY | O_CLOEXEC)) < 0) return 1;
    prctl(PR_SET_TIMERSLACK, 1);

    long long begin_ns = read_clock_ns(CLOCK_MONOTONIC), cpu_ns = 0;
    const double seconds = atof(argv[2]) + 1e-9 * (double)((long long)kFirst * period_ns);
    const long long end_ns = begin_ns + (long long)(seconds * 1e9);
    long long deadline_ns = begin_ns, now_ns = begin_ns, gauges_ns = begin_ns;
    size_t samples = 0;
    while (samples < most && deadline_ns < end_ns) {
        char text[32];
        if (samples == kFirst) {
            begin_ns = read_clock_ns(CLOCK_MONOTONIC);
            cpu_ns = read_clock_ns(CLOCK_THREAD_CPUTIME_ID);
        }
        late_ns[samples++] = (now_ns = read_clock_ns(CLOCK_MONOTONIC)) - deadline_ns;
        for (int i = 0; i < files; ++i)
            if (pread(fds[i], text, sizeof text - 1, 0) <= 0) return 1;
        const int all = now_ns >= gauges_ns;
        if (all) gauges_ns = now_ns + kGaugesNs;
        if (count > 0 && !read_nvml(all)) return 1;
        if (period_ns == 0) {
            deadline_ns = now_ns;
            continue;
        }
        do deadline_ns += period_ns;
        while (deadline_ns <= now_ns);
        const struct timespec until = {deadline_ns / kNsPerS, deadline_ns % kNsPerS};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    }
    const long long used_ns = read_clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu_ns;
    const long long took_ns = read_clock_ns(CLOCK_MONOTONIC) - begin_ns;
    qsort(late_ns, samples, sizeof *late_ns, ascending);
    if (samples <= kFirst) return 1;
    printf("%zu %lld %lld %lld %lld\n", samples - kFirst, used_ns, took_ns,
           late_ns[samples / 2] - late_ns[0], late_ns[samples * 99 / 100] - late_ns[0]);
    return 0;
}
