// A process tree that says how much CPU time it used.
//
//     workload KIND FILE    KIND: threads workers daemons short ignored exec storm busy
//
// Some of the work is done, then "ready" is printed and a line of stdin awaited, then the rest.
// FILE gets two int64, ns in all and since the line: what the kernel charged to the main
// process and to all who were waited for, and what the others say by their own clocks as they end.
// These leave out how the kernel takes a process apart.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <csignal>
#include <ctime>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

struct Used {
    std::atomic<std::int64_t> total_ns, since_ns;
};

Used* used;
std::int64_t before_ns;  // what this process had used when the line came

std::int64_t clock_ns(clockid_t clock) {
    timespec t{};
    ::clock_gettime(clock, &t);
    return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

// Until this thread's clock shows that much.
void burn_until(double ms) {
    while (static_cast<double>(clock_ns(CLOCK_THREAD_CPUTIME_ID)) < ms * 1e6) {
    }
}

void burn(double ms) {
    burn_until(static_cast<double>(clock_ns(CLOCK_THREAD_CPUTIME_ID)) * 1e-6 + ms);
}

std::int64_t charged_ns() {
    std::int64_t sum_us = 0;
    for (const int who : {RUSAGE_SELF, RUSAGE_CHILDREN}) {
        rusage usage{};
        ::getrusage(who, &usage);
        for (const timeval& t : {usage.ru_utime, usage.ru_stime})
            sum_us += t.tv_sec * 1'000'000 + t.tv_usec;
    }
    return 1000 * sum_us;
}

void tell(std::int64_t now_ns) {
    used->total_ns += now_ns;
    used->since_ns += now_ns - before_ns;
}

template <typename Work>
void start(bool waited, Work work) {
    const pid_t pid = ::fork();
    if (pid < 0) ::abort();
    if (pid > 0) return;
    before_ns = 0;
    work();
    if (!waited)
        tell(clock_ns(CLOCK_PROCESS_CPUTIME_ID));
    else
        used->since_ns -= before_ns;  // whoever waits will be told all of it
    ::_exit(0);
}

// Holds back processes that are to live through the line; they arrive, then wait to be let go.
struct Gate {
    int arrived[2], open[2];
    Gate() {
        if (::pipe(arrived) != 0 || ::pipe(open) != 0) ::abort();
    }
    void pass() const {
        char byte = 0;
        ::close(open[1]);
        if (::write(arrived[1], &byte, 1) != 1) ::abort();
        before_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
        if (::read(open[0], &byte, 1) != 0) ::abort();
    }
    void await(int count) const {
        for (char byte; count > 0; --count)
            if (::read(arrived[0], &byte, 1) != 1) ::abort();
    }
};

void await_line() {
    before_ns = charged_ns();
    used->since_ns = 0;
    std::puts("ready");
    std::fflush(stdout);
    std::getchar();
}

void wait_for_all() {
    while (::wait(nullptr) > 0) {
    }
}

void threads() {
    const Gate gate;
    std::vector<std::thread> all;
    std::atomic<int> half{0};
    for (int i = 0; i < 12; ++i)
        all.emplace_back([&] {
            burn(25);
            char byte = 0;
            ++half;
            if (::write(gate.arrived[1], &byte, 1) != 1 || ::read(gate.open[0], &byte, 1) != 0)
                ::abort();
            burn(50);
            std::thread([] { burn(40); }).join();
        });
    gate.await(12);
    await_line();
    ::close(gate.open[1]);
    for (std::thread& thread : all) thread.join();
}

void workers() {
    const Gate gate;
    for (int i = 0; i < 6; ++i)
        start(true, [&] {
            burn(50);
            gate.pass();
            burn(150);
            start(true, [] { burn(30); });
            wait_for_all();
        });
    gate.await(6);
    await_line();
    ::close(gate.open[1]);
    wait_for_all();
}

// Twice forked, a session of their own, and nobody of the tree to wait for them.
void daemons(int count) {
    int end[2];
    if (::pipe(end) != 0) ::abort();
    for (int i = 0; i < count; ++i) {
        start(true, [] {
            ::setsid();
            start(false, [] { burn(200); });
        });
        ::wait(nullptr);
    }
    ::close(end[1]);
    char byte = 0;
    if (::read(end[0], &byte, 1) != 0) ::abort();  // closed by the last of them
    ::close(end[0]);
}

void many(int count, double ms, bool ignored) {
    int end[2];
    if (ignored) std::signal(SIGCHLD, SIG_IGN);
    for (int i = 0; i < count; ++i) {
        if (::pipe(end) != 0) ::abort();
        start(!ignored, [=] { burn_until(ms); });
        ::close(end[1]);
        char byte = 0;
        if (::read(end[0], &byte, 1) != 0) ::abort();
        ::close(end[0]);
        if (!ignored) ::wait(nullptr);
    }
}

void storm(int count, double ms) {
    for (int i = 0; i < count; ++i) start(true, [=] { burn_until(ms); });
    wait_for_all();
}

void twice(void (*work)(bool later)) {
    work(false);
    await_line();
    work(true);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return 2;
    const std::string kind = argv[1];
    const int file = ::open(argv[2], O_RDWR | O_CLOEXEC);
    used = static_cast<Used*>(
        ::mmap(nullptr, sizeof(Used), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    if (used == MAP_FAILED) return 2;
    if (kind == "threads") threads();
    if (kind == "workers") workers();
    if (kind == "daemons") twice([](bool later) { daemons(later ? 5 : 1); });
    if (kind == "short") twice([](bool later) { many(later ? 220 : 30, 5, false); });
    // Longer than `short`: taking a process apart costs up to 0.1 ms on a busy machine, and nobody
    // is told of it here.
    if (kind == "ignored") twice([](bool later) { many(later ? 55 : 8, 20, true); });
    if (kind == "storm") twice([](bool later) { storm(later ? 1200 : 120, 1); });
    if (kind == "busy") {  // forks all the time, whoever comes
        std::puts("ready");
        std::fflush(stdout);
        while (charged_ns() < 1'500'000'000) {
            for (int i = 0; i < 5; ++i) start(true, [] { burn_until(3); });
            wait_for_all();
        }
    }
    if (kind == "exec") {
        // The clock of a process goes on over exec: the last of the chain tells of all.
        int left = argc > 3 ? std::atoi(argv[3]) : 40;
        before_ns = argc > 4 ? std::atoll(argv[4]) : 0;
        burn(40);
        if (left == 30) await_line();
        if (--left > 0) {
            ::execl("/proc/self/exe", argv[0], "exec", argv[2], std::to_string(left).c_str(),
                    std::to_string(before_ns).c_str(), nullptr);
            return 2;
        }
    }
    tell(charged_ns());
    return 0;
}
