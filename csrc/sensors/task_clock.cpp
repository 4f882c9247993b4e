#include "sensors/task_clock.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include <linux/perf_event.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pepr {

namespace {

constexpr int kMostRounds = 20;
constexpr std::size_t kCheap = 256;  // threads to list

// Puts many descriptors where a program that lives by its soft limit does not miss them (1024 by
// default, and all that select() takes): beyond that limit, which is raised while this lives. A
// program that is started at just that moment inherits the higher one.
class Shelf {
public:
    Shelf() { ::getrlimit(RLIMIT_NOFILE, &before_); }
    ~Shelf() {
        if (raised_) ::setrlimit(RLIMIT_NOFILE, &before_);
    }
    Shelf(const Shelf&) = delete;
    Shelf& operator=(const Shelf&) = delete;

    // The same file in its place; none, and errno EMFILE, if there is none left.
    File place(File file) noexcept {
        if (++placed_ <= kFewFiles) return file;
        if (placed_ == kFewFiles + 1 && before_.rlim_cur < before_.rlim_max) {
            rlimit raised = before_;
            raised.rlim_cur = raised.rlim_max;
            raised_ = ::setrlimit(RLIMIT_NOFILE, &raised) == 0;
        }
        if (raised_)
            return File(::fcntl(file.fd(), F_DUPFD_CLOEXEC, static_cast<int>(before_.rlim_cur)));
        if (static_cast<rlim_t>(file.fd()) + kFewFiles < before_.rlim_cur) return file;
        errno = EMFILE;
        return {};
    }

private:
    static constexpr rlim_t kFewFiles = 64;  // that a program can spare, and that it needs at least

    rlimit before_{};
    rlim_t placed_ = 0;
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

// perf's task-clock on a thread and its heirs. Whether it counts the kernel's part is not asked
// for, since that needs no permission then, and this clock counts it all the same.
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

// What was started before its parent's event was there has inherited nothing and gets an event of
// its own; what was started after has, and must get none. Pids are given out in order, so that the
// pid that was last when the parent's event was opened tells one from the other. A fork that is
// just under way then may be taken for an heir: it is as if it had been missed, which
// ProcessTree's account makes up for.
TaskClock::TaskClock(ProcessTree& tree) {
    Shelf shelf;
    std::set<pid_t> known;
    std::map<pid_t, pid_t> opened_after;  // process: the pid given out last before its first event
    pid_t last = -1;
    bool found_new = true;
    for (int round = 0; found_new && round < kMostRounds; ++round) {
        // Once more even if nothing was born, where that is cheap: for what was just being born.
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
            if (event) event = shelf.place(std::move(event));
            if (event)
                events_.push_back(std::move(event));
            else if (errno != ESRCH)  // it has exited
                refuse(thread.id, errno);
        }
    }
}

double TaskClock::read_s() noexcept {
    std::uint64_t sum_ns = 0;
    for (const File& event : events_) {
        std::uint64_t ns = 0;
        if (::read(event.fd(), &ns, sizeof ns) != sizeof ns) return read_s_;
        sum_ns += ns;
    }
    return read_s_ = 1e-9 * static_cast<double>(sum_ns);
}

}  // namespace pepr
