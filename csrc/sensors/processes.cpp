// CPU time and memory of a process tree, and how busy the whole machine was meanwhile.
//
// `processes:self` follows this process and its descendants, `processes:children` the descendants
// alone (a wrapper does not charge itself to its child).
//
// The tree's CPU time is what the kernel already added up for us (time of children that were
// waited for) plus the running clocks of those that live. An orphan's time reaches us when we are
// its subreaper and wait for it. Parents are read before their children, so that a child that is
// reaped in between is missed for one sample, never counted twice.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string_view>

#include <dirent.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../clock.h"
#include "../file.h"
#include "../sensor.h"

namespace pepr {

namespace {

constexpr std::size_t kMostProcesses = 1 << 16;  // reserved, touched only when used

double seconds(const timeval& t) noexcept {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
}

// The clock of a process, as clock_getcpuclockid makes it but without its system call:
// MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of include/linux/posix-timers.h.
clockid_t cpu_clock_of(pid_t pid) noexcept {
    return static_cast<clockid_t>(~static_cast<unsigned>(pid) << 3 | 2u);
}

// The numbers of /proc/PID/stat that we use; proc(5) counts fields from 1.
struct Stat {
    double own_s, waited_s;
    std::uint64_t start_ticks;
    std::uint64_t rss_bytes;
};

class Processes final : public Sensor {
public:
    explicit Processes(bool with_self)
        : with_self_(with_self),
          self_(::getpid()),
          stat_("/proc/stat"),
          last_pid_("/proc/loadavg") {
        if (!stat_ || !last_pid_ || !File("/proc/thread-self/children"))
            throw SensorError("the process tree cannot be followed",
                              "/proc is not mounted, or its kernel lacks CONFIG_PROC_CHILDREN",
                              "mount /proc (mount -t proc proc /proc)");
        const std::string cpus = std::to_string(::sysconf(_SC_NPROCESSORS_ONLN));
        const auto memory = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * page_bytes_;
        const std::string scope = with_self ? "self" : "children";
        const auto add = [&](const char* name, const char* quantity, const char* unit, bool counter,
                             std::map<std::string, std::string> labels) {
            channels_.push_back(
                {name, quantity, unit, 1.0, 0.0, counter, "procfs", std::move(labels)});
        };
        add("job/cpu", "cpu_time", "s", true, {{"scope", "job"}, {"root", scope}});
        add("job/rss", "memory", "B", false,
            {{"scope", "job"}, {"installed_bytes", std::to_string(memory)}});
        add("job/processes", "count", "1", false, {{"scope", "job"}});
        add("system/busy", "cpu_time", "s", true, {{"scope", "system"}, {"cpus", cpus}});
        tree_.reserve(kMostProcesses);
    }

    void poll(double* out) noexcept override {
        find_new();
        rusage waited{};
        ::getrusage(RUSAGE_CHILDREN, &waited);
        double cpu_s = seconds(waited.ru_utime) + seconds(waited.ru_stime);
        double reaped_s = cpu_s - waited_s_, vanished_s = 0.0;
        waited_s_ = cpu_s;
        std::uint64_t rss_bytes = 0;
        std::size_t living = 0;
        if (with_self_) {
            cpu_s += 1e-9 * static_cast<double>(read_clock_ns(CLOCK_PROCESS_CPUTIME_ID));
            Stat stat{};
            if (read_stat(self_, stat)) rss_bytes += stat.rss_bytes;
            ++living;
        }
        std::size_t kept = 0;
        for (Process& process : tree_) {
            Stat stat{};
            if (!read_stat(process.pid, stat) || stat.start_ticks != process.start_ticks) {
                vanished_s += process.own_s + process.waited_s;
                continue;
            }
            reaped_s += stat.waited_s - process.waited_s;
            process.own_s = stat.own_s;
            process.waited_s = stat.waited_s;
            cpu_s += stat.own_s + stat.waited_s;
            rss_bytes += stat.rss_bytes;
            tree_[kept++] = process;
        }
        tree_.resize(kept);  // never grows: no allocation
        keep_lost(vanished_s, reaped_s);
        // Dips: a child reaped while we read, and cutime cut off to ticks where it was exact
        // before.
        out[0] = job_cpu_s_ = std::max(job_cpu_s_, cpu_s + lost_s_);
        out[1] = static_cast<double>(rss_bytes);
        out[2] = static_cast<double>(living + kept);
        out[3] = busy_s();
    }

private:
    struct Process {
        pid_t pid;
        std::uint64_t start_ticks;  // with the pid, names one process for ever
        double own_s, waited_s;     // when last seen
    };

    // The fifth field of /proc/loadavg is the pid given out last: while it stands still nothing was
    // forked in our pid namespace, and the tree need not be searched. After a change it is searched
    // twice: a process gets its pid a moment before its parent lists it.
    void find_new() noexcept {
        char text[128];
        const std::size_t length = last_pid_.read(text, sizeof text);
        const char* const space = static_cast<const char*>(memrchr(text, ' ', length));
        long last_pid = -1;
        if (space != nullptr) std::from_chars(space + 1, text + length, last_pid);
        const bool changed = last_pid < 0 || last_pid != seen_pid_;
        if (!changed && settled_) return;
        seen_pid_ = last_pid;
        settled_ = !changed;
        add_children_of(self_);
        for (std::size_t i = 0; i < tree_.size(); ++i) add_children_of(tree_[i].pid);
    }

    void add_children_of(pid_t pid) noexcept {
        char path[64];
        std::snprintf(path, sizeof path, "/proc/%d/task", pid);
        const File tasks(path);  // not there: it has exited
        // opendir would allocate; the system call beneath it does not.
        for (long n; (n = ::syscall(SYS_getdents64, tasks.fd(), entries_, sizeof entries_)) > 0;) {
            for (const char* at = entries_; at < entries_ + n;) {
                const auto* const entry = reinterpret_cast<const dirent64*>(at);
                at += entry->d_reclen;
                if (entry->d_name[0] != '.') add_children_of_task(path, entry->d_name);
            }
        }
    }

    void add_children_of_task(const char* tasks, const char* task) noexcept {
        char path[384];
        std::snprintf(path, sizeof path, "%s/%s/children", tasks, task);
        const std::size_t length = File(path).read(text_, sizeof text_);
        const char* at = text_;
        for (pid_t child = 0; parse_number(at, text_ + length, child);) add(child);
    }

    void add(pid_t pid) noexcept {
        const auto known = [pid](const Process& p) { return p.pid == pid; };
        if (std::any_of(tree_.begin(), tree_.end(), known) || tree_.size() == kMostProcesses)
            return;
        Stat stat{};
        if (read_stat(pid, stat))
            tree_.push_back({pid, stat.start_ticks, stat.own_s, stat.waited_s});
    }

    bool read_stat(pid_t pid, Stat& stat) const noexcept {
        char path[32], text[1024];
        std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
        const std::size_t length = File(path).read(text, sizeof text);
        // Field 2, the command, may hold spaces and parentheses: the last ) ends it.
        const char* at = static_cast<const char*>(memrchr(text, ')', length));
        if (at == nullptr || length < static_cast<std::size_t>(at - text) + 4) return false;
        at += 4;  // ") S "
        const char* const end = text + length;
        std::uint64_t utime = 0, stime = 0;
        long cutime = 0, cstime = 0;
        for (int field = 4; field <= 24; ++field) {
            bool ok = true;
            long signed_value = 0;
            if (field == 14)
                ok = parse_number(at, end, utime);
            else if (field == 15)
                ok = parse_number(at, end, stime);
            else if (field == 16)
                ok = parse_number(at, end, cutime);
            else if (field == 17)
                ok = parse_number(at, end, cstime);
            else if (field == 22)
                ok = parse_number(at, end, stat.start_ticks);
            else if (field == 24)
                ok = parse_number(at, end, stat.rss_bytes);
            else
                ok = parse_number(at, end, signed_value) || skip_word(at, end);
            if (!ok) return false;
        }
        stat.rss_bytes *= page_bytes_;
        stat.waited_s = static_cast<double>(cutime + cstime) * tick_s_;
        // The process's own clock counts ns; the ticks are for kernels that refuse it.
        const std::int64_t own_ns = read_clock_ns(cpu_clock_of(pid));
        stat.own_s = own_ns >= 0 ? 1e-9 * static_cast<double>(own_ns)
                                 : static_cast<double>(utime + stime) * tick_s_;
        return true;
    }

    static bool skip_word(const char*& at, const char* end) noexcept {
        while (at < end && *at != ' ') ++at;
        return at < end;
    }

    // The time of a process that vanishes turns up with the parent that waited for it, at the next
    // poll at the latest. The kernel drops it when the parent ignores SIGCHLD, and it goes
    // elsewhere when we are no subreaper: then what was last seen of it is kept. Less than the
    // rounding of cutime and cstime, a tick each, is none: kept child by child, that would add up.
    void keep_lost(double vanished_s, double reaped_s) noexcept {
        const double overdue_s = std::max(0.0, owed_s_ - reaped_s);
        if (overdue_s > 2 * tick_s_) lost_s_ += overdue_s;
        owed_s_ = std::max(0.0, vanished_s - std::max(0.0, reaped_s - owed_s_));
    }

    // First line of /proc/stat: user nice system idle iowait irq softirq steal guest guest_nice.
    // guest is in user already; steal ran elsewhere.
    double busy_s() noexcept {
        const std::size_t length = stat_.read(text_, sizeof text_);
        const char* at = text_ + std::strlen("cpu");
        std::uint64_t ticks[7] = {};
        for (std::uint64_t& value : ticks)
            if (!parse_number(at, text_ + length, value)) return kUnknown;
        const auto busy = ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6];
        return static_cast<double>(busy) * tick_s_;
    }

    const bool with_self_;
    const pid_t self_;
    const double tick_s_ = 1.0 / static_cast<double>(::sysconf(_SC_CLK_TCK));
    const std::uint64_t page_bytes_ = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    File stat_, last_pid_;
    std::vector<Process> tree_;
    long seen_pid_ = -1;
    bool settled_ = false;
    double job_cpu_s_ = 0.0;
    double waited_s_ = 0.0;  // by us, RUSAGE_CHILDREN
    double owed_s_ = 0.0;    // vanished at the last poll, and not seen with a parent yet
    double lost_s_ = 0.0;
    char text_[1 << 14];
    alignas(dirent64) char entries_[1 << 13];
};

}  // namespace

std::unique_ptr<Sensor> open_processes(const std::string& where) {
    if (where != "self" && where != "children")
        throw SensorError("sensor 'processes:" + where + "' does not exist",
                          "the tree to follow is not stated",
                          "use processes:self or processes:children");
    return std::make_unique<Processes>(where == "self");
}

}  // namespace pepr
