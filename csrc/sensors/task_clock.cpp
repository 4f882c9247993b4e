#include "sensors/task_clock.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include <linux/perf_event.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "system/clock.h"

namespace pepr {

namespace {

constexpr int kMostRounds = 20;
constexpr std::size_t kCheap = 256;  // threads to list

// Moves many descriptors beyond the soft limit (1024 by default, and the most that select() takes),
// so that the program still has all of those below. It raises the limit while it exists; a program
// started at that very moment inherits the higher limit.
class HighDescriptors {
public:
    HighDescriptors() { ::getrlimit(RLIMIT_NOFILE, &before_); }
    ~HighDescriptors() {
        if (raised_) ::setrlimit(RLIMIT_NOFILE, &before_);
    }
    HighDescriptors(const HighDescriptors&) = delete;
    HighDescriptors& operator=(const HighDescriptors&) = delete;

    // The same file with a high descriptor, except for the first few. No file, and errno EMFILE, if
    // no descriptor is free.
    File move_up(File file) noexcept {
        if (++moved_ <= kFewFiles) return moved_up(std::move(file));
        if (moved_ == kFewFiles + 1 && before_.rlim_cur < before_.rlim_max) {
            rlimit raised = before_;
            raised.rlim_cur = raised.rlim_max;
            raised_ = ::setrlimit(RLIMIT_NOFILE, &raised) == 0;
        }
        if (raised_) {
            const int lowest = static_cast<int>(before_.rlim_cur);
            file = File(::fcntl(file.fd(), F_DUPFD_CLOEXEC, lowest));
        } else if (static_cast<rlim_t>(file.fd()) + kFewFiles >= before_.rlim_cur) {
            errno = EMFILE;
            return {};
        }
        file.remember();
        return file;
    }

private:
    static constexpr rlim_t kFewFiles = 64;  // a program can spare as many, and needs as many

    rlimit before_{};
    rlim_t moved_ = 0;
    bool raised_ = false;
};

[[noreturn]] void refuse(pid_t thread, int error) {
    const char* const what = "CPU time cannot be counted by perf";
    if (error == EMFILE)
        throw SensorError(what, "one descriptor a thread is needed, and no more may be open",
                          "raise the hard limit, as root: ulimit -n 1048576");
    if (!is_denied(error))
        throw SensorError(what, std::string("perf_event_open: ") + std::strerror(error),
                          "use a kernel with CONFIG_PERF_EVENTS");
    const std::string paranoid = read_text("/proc/sys/kernel/perf_event_paranoid");
    // 3 and 4 are Debian's and Ubuntu's own: no perf for users at all.
    if (std::atoi(paranoid.c_str()) > 2)
        throw SensorError(denied(what, "kernel.perf_event_paranoid is " + paranoid,
                                 "sudo sysctl kernel.perf_event_paranoid=2"));
    const std::string pid = std::to_string(thread);
    if (::access(("/proc/" + pid + "/environ").c_str(), R_OK) != 0)
        throw SensorError(
            denied(what, "process " + pid + " is another user's", "run as that user, or as root"));
    throw SensorError(denied(what, "a seccomp filter or a security module is in the way",
                             "let it use perf_event_open; docker: --cap-add PERFMON"));
}

// perf's task-clock of a thread and all that it starts. exclude_kernel avoids the need for a
// permission; this clock counts the time in the kernel all the same.
File open_clock(pid_t thread) noexcept {
    perf_event_attr attr{};
    attr.size = sizeof attr;
    attr.type = PERF_TYPE_SOFTWARE;
    attr.config = PERF_COUNT_SW_TASK_CLOCK;
    attr.inherit = 1;
    attr.exclude_kernel = 1;
    attr.exclude_hv = 1;
    return File(static_cast<int>(
        ::syscall(SYS_perf_event_open, &attr, thread, -1, -1, PERF_FLAG_FD_CLOEXEC)));
}

}  // namespace

// A process started before its parent's event was open inherits nothing and needs an event of its
// own. One started after that inherits the event and must get none. The kernel gives out pids in
// order, so the last pid at the time when the parent's event was opened separates the two. A fork
// just in progress then may be taken for one that inherited: its time is missed here, and
// ProcessTree's account makes up for it.
TaskClock::TaskClock(ProcessTree& tree) {
    HighDescriptors descriptors;
    std::set<pid_t> known;
    std::map<pid_t, pid_t> opened_after;  // process: the last pid when its first event was opened
    pid_t last = -1;
    bool found_new = true;
    for (int round = 0; found_new && round < kMostRounds; ++round) {
        // Where it is cheap, search once more even if no pid was given out: for a fork in progress.
        if (round > 0 && tree.last_pid() == last && known.size() > kCheap) break;
        found_new = false;
        last = tree.last_pid();
        for (const ProcessTree::Thread& thread : tree.search()) {
            if (!known.insert(thread.id).second) continue;
            const auto opened = opened_after.find(thread.starter);
            const bool inherited = round > 0 && (opened == opened_after.end() ||
                                                 tree.born_after(thread.id, opened->second));
            if (inherited) continue;
            found_new = true;
            opened_after.emplace(thread.process, tree.last_pid());
            File event = open_clock(thread.id);
            if (event) event = descriptors.move_up(std::move(event));
            if (event)
                events_.push_back(std::move(event));
            else if (errno != ESRCH)  // ESRCH: it has exited
                refuse(thread.id, errno);
        }
    }
}

double TaskClock::read_s() noexcept {
    std::uint64_t sum_ns = 0;
    for (const File& event : events_) {
        std::uint64_t ns = 0;
        if (!event.is_ours() || ::read(event.fd(), &ns, sizeof ns) != sizeof ns) return read_s_;
        sum_ns += ns;
    }
    return read_s_ = 1e-9 * static_cast<double>(sum_ns);
}

// --- one thread ----------------------------------------------------------------------------------

namespace {

// The clock of a thread, as pthread_getcpuclockid returns it: MAKE_THREAD_CPUCLOCK(tid,
// CPUCLOCK_SCHED) of include/linux/posix-timers.h.
clockid_t thread_clock_of(pid_t thread) noexcept {
    return static_cast<clockid_t>(~static_cast<unsigned>(thread) << 3 | 6u);
}

}  // namespace

ThreadClock::ThreadClock()
    : thread_(static_cast<pid_t>(::syscall(SYS_gettid))), event_(moved_up(open_clock(thread_))) {
    if (!event_) before_s_ = 1e-9 * static_cast<double>(read_clock_ns(thread_clock_of(thread_)));
}

double ThreadClock::read_s() noexcept {
    std::uint64_t ns = 0;
    if (event_) {
        if (event_.is_ours() && ::read(event_.fd(), &ns, sizeof ns) == sizeof ns)
            read_s_ = 1e-9 * static_cast<double>(ns);
    } else if (const std::int64_t own_ns = read_clock_ns(thread_clock_of(thread_)); own_ns >= 0) {
        read_s_ = std::max(read_s_, 1e-9 * static_cast<double>(own_ns) - before_s_);
    }
    return read_s_;
}

}  // namespace pepr
