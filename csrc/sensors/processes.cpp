// CPU time and memory of a process tree, and the CPU time of the whole machine.
//
// `processes:self` follows this process and its descendants; `processes:children` the descendants
// alone, for a wrapper, which is no part of its job; `processes:pids=12,34` those processes and
// their descendants, without this process if it is among them; `processes:cgroup=/sys/fs/cgroup/x`
// what is in a cgroup (cgroup.cpp). With `,mark=NAME=VALUE` behind it, processes that were born
// since with this variable count too, wherever they hang. CPU time counts from the opening on.

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include <unistd.h>

#include "sensors/cpu_time_reconciler.h"
#include "sensors/machine_time.h"
#include "sensors/marked_processes.h"
#include "sensors/process_channels.h"
#include "sensors/process_tree.h"
#include "sensors/sensor.h"
#include "sensors/task_clock.h"
#include "system/clock.h"
#include "system/file.h"
#include "system/numbers.h"

namespace pepr {

std::unique_ptr<Sensor> open_cgroup(const std::string& where);

namespace {

// Where perf counts the time, a sample costs about the same however large the tree is: at most so
// many clocks and events, 0.5 µs each, and reads of /proc (memory, children, who lives), 15 µs
// each. A larger tree is read whole, but only every few samples: with 2,000 attached processes, the
// time every 4 and the memory every 84. Zombies, which a fork storm piles up, delay only their own
// clocks. The last reading before an attached tree ends is the only one of the time that the kernel
// took to tear down its processes.
constexpr std::size_t kClocksPerSample = 1024;
constexpr std::size_t kReadsPerSample = 24;

constexpr const char *kPids = "pids=", *kCgroup = "cgroup=", *kMark = ",mark=";

// Why a file of /proc cannot be opened: for want of descriptors or memory, or what is usual.
std::string why_not(const std::string& path, const char* usual) {
    const PlainLocale plain;
    const File file(path);
    const bool short_of = !file && (errno == EMFILE || errno == ENFILE || errno == ENOMEM);
    return short_of ? std::strerror(errno) : usual;
}

class Processes final : public Sensor {
public:
    Processes(const std::string& where, const std::vector<pid_t>& roots, const std::string& mark)
        : left_out_(where == "self" ? 0 : ::getpid()), tree_(roots, left_out_) {
        if (!mark.empty()) marked_.emplace(mark);
        if (!machine_ || tree_.last_pid() < 0)
            throw SensorError("the process tree cannot be followed",
                              why_not("/proc/loadavg", "/proc is not mounted"),
                              "mount /proc (mount -t proc proc /proc)");
        for (const pid_t root : roots)
            if (!tree_.has(root))
                throw SensorError(
                    "process " + std::to_string(root) + " cannot be followed",
                    why_not("/proc/" + std::to_string(root) + "/stat", "it has exited"),
                    "ps -p PID shows what still runs");
        std::string source = "perf task-clock, inherited, put right by process clocks";
        try {
            clock_.emplace(tree_);
        } catch (const SensorError& error) {
            source = "process clocks";
            Note note = error.note;
            note.what = "CPU time of processes that end unseen";
            note.why += kMisses;
            notes_.push_back(std::move(note));
            tree_.search();
        }
        channels_ = process_channels(where, source);
        own_before_s_ = own_s();
        machine_.busy_s();
        reconciler_.emplace(machine_.stolen_s(), 1.0 / static_cast<double>(::sysconf(_SC_CLK_TCK)));
        if (clock_) counted_before_s_ = clock_->read_s();
        tree_.begin();
    }

    void poll(double* out) noexcept override {
        const double busy_s = machine_.busy_s();
        const double cpu_s = clock_ ? counted_s() : accounted_s();
        // It may dip: a child is reaped while we read, or cutime is rounded down to ticks.
        out[0] = job_cpu_s_ = std::max(job_cpu_s_, cpu_s);
        out[1] = static_cast<double>(tree_.rss_bytes());
        out[2] = static_cast<double>(tree_.living());
        out[3] = busy_s;
        if (!marked_) return;
        marked_->follow(tree_);
        out[0] += marked_cpu_s_ = std::max(marked_cpu_s_, marked_->read_s());
        out[1] += static_cast<double>(marked_->found().rss_bytes());
        out[2] += static_cast<double>(marked_->found().living());
    }

    void finish() noexcept override { skipped_ = tree_.processes().size(); }

private:
    static constexpr const char* kMisses =
        "; process clocks miss children of less than a sample (0.1 s) that nobody waits for, "
        "and the end of a process that was attached to";

    double counted_s() noexcept {
        if (!read_tree()) return job_cpu_s_;
        const double count_s = clock_->read_s() - counted_before_s_ - (own_s() - own_before_s_);
        const bool changed = std::exchange(changed_, false);
        return reconciler_->update(count_s, tree_.accounted_s(), changed,
                                   [this] { return machine_.stolen_s(); });
    }

    // False if the clocks are not due yet.
    bool read_tree() noexcept {
        const std::size_t before = tree_.processes().size();
        tree_.follow();
        const std::size_t size = tree_.processes().size();
        changed_ = changed_ || size != before;
        ++skipped_;
        if (skipped_ * kReadsPerSample >= size) {
            refresh();
            return true;
        }
        const auto due = [&](std::size_t clocks) {
            return skipped_ % (1 + (clocks + clock_->events()) / kClocksPerSample) == 0;
        };
        if (!due(tree_.living())) return false;
        const std::size_t gone = tree_.read_clocks(due(size));
        changed_ = changed_ || gone > 0;
        if (2 * gone > size)
            refresh();
        else if (gone > 0)
            tree_.settle(kReadsPerSample);
        return true;
    }

    void refresh() noexcept {
        changed_ = tree_.refresh() || changed_;
        skipped_ = 0;
    }

    double accounted_s() noexcept {
        const bool forked = tree_.follow();
        const bool vanished = tree_.read_clocks(true) > 0;
        if (forked || vanished || unsettled_)
            unsettled_ = tree_.refresh();
        else
            tree_.refresh(kReadsPerSample);
        return tree_.accounted_s();
    }

    double own_s() noexcept {
        if (!tree_.has(left_out_)) return 0.0;
        return 1e-9 * static_cast<double>(read_clock_ns(CLOCK_PROCESS_CPUTIME_ID));
    }

    const pid_t left_out_;
    MachineTime machine_;
    ProcessTree tree_;
    std::optional<TaskClock> clock_;
    std::optional<CpuTimeReconciler> reconciler_;
    std::optional<MarkedProcesses> marked_;
    double counted_before_s_ = 0.0, own_before_s_ = 0.0, job_cpu_s_ = 0.0, marked_cpu_s_ = 0.0;
    std::size_t skipped_ = 0;  // samples since all processes were read
    bool changed_ = true;      // a process was born or has ended since the clocks were read
    bool unsettled_ = true;    // a process vanished at the last refresh
};

std::vector<pid_t> parse_pids(const std::string& where) {
    std::vector<pid_t> pids;
    const char* at = where.data() + std::strlen(kPids);
    const char* const end = where.data() + where.size();
    for (pid_t pid = 0; parse_number(at, end, pid) && pid > 0; ++at) {
        pids.push_back(pid);
        if (at == end) return pids;
        if (*at != ',') break;
    }
    return {};
}

}  // namespace

std::unique_ptr<Sensor> open_processes(const std::string& spec) {
    if (spec.rfind(kCgroup, 0) == 0) return open_cgroup(spec);
    const std::size_t comma = spec.find(kMark);
    const std::string where = spec.substr(0, comma);
    const std::string mark =
        comma == std::string::npos ? "" : spec.substr(comma + std::strlen(kMark));
    std::vector<pid_t> roots;
    if (where == "self" || where == "children")
        roots = {::getpid()};
    else if (where.rfind(kPids, 0) == 0)
        roots = parse_pids(where);
    if (roots.empty())
        throw SensorError("sensor 'processes:" + where + "' does not exist",
                          "the tree to follow is not stated",
                          "use processes:self, processes:children, processes:pids=PID,PID or "
                          "processes:cgroup=PATH");
    return std::make_unique<Processes>(where, roots, mark);
}

}  // namespace pepr
