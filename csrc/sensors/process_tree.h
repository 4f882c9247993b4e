// Which processes belong to a tree, and the CPU time and memory that they use.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <sys/types.h>

#include "sensors/process_stat.h"
#include "system/file.h"

namespace pepr {

// One process and the account of its CPU time. The kernel adds the time of a child to its parent's
// waited_s when the parent waits for it. Time from before the tree was watched does not count: it
// is subtracted wherever it turns up.
struct Process {
    pid_t pid;
    ProcessStat seen;  // as read last; its start_ticks and the pid identify a process
    double before_own_s = 0.0, before_waited_s = 0.0;  // when the watch began
    double owed_s = 0.0;     // time of children that vanished: it has to turn up in waited_s
    double overdue_s = 0.0;  // what was owed already at the last read, and should be there by now
    double foreign_s = 0.0;  // the part of owed_s from before the tree was watched
    File stat = {};          // its /proc/PID/stat, kept open in a small tree
    bool gone = false;       // it vanished, but is not dropped yet

    double grown_s() const noexcept { return seen.waited_s - before_waited_s; }
};

// A set of processes and all their descendants. It only reads: it waits for, traces or stops
// nobody.
//
// New processes are found among the pids that the kernel gave out since the last search, so that a
// search costs as much as was forked, however large the tree is. A process whose parent ends before
// it is found is missed, unless its new parent is of the tree, as a subreaper is.
class ProcessTree {
public:
    // `left_out` (0: none) does not count: not its own time and memory, nor as a living process.
    // Its children count.
    ProcessTree(const std::vector<pid_t>& roots, pid_t left_out);

    struct Thread {
        pid_t id, process, starter;  // the process that started it
    };
    // Adds all descendants by walking down the tree, and returns all threads. This allocates; the
    // functions below do not.
    std::vector<Thread> search();

    // Counts time from here on.
    void begin() noexcept;

    // Adds a process with all the time since its birth. False if it has ended.
    bool adopt(pid_t pid) noexcept;
    // The parent of any process; -1 if it has ended.
    pid_t parent_of(pid_t pid) const noexcept;

    // Calls `visit` for each living process whose pid was given out after `pid` and until `last`.
    template <typename Visit>
    void for_each_between(pid_t pid, pid_t last, Visit visit) const noexcept {
        if (pid < 0 || last < 0) return;
        for (pid_t tries = 0; pid != last && tries < pid_max_; ++tries) {
            if (++pid >= pid_max_) pid = std::min(kFirstPid, last);
            if (read_clock_ns(cpu_clock_of(pid)) >= 0) visit(pid);
        }
    }

    // Adds the descendants born since the last call. True if any process was born, ours or not.
    bool follow() noexcept;

    // The last pid that was given out when `follow` was called last.
    pid_t followed_until() const noexcept { return searched_until_; }

    // Reads the clock of each process, or of each that is not a zombie: a zombie's clock stands
    // still. Returns how many processes vanished; refresh or settle drops them.
    std::size_t read_clocks(bool zombies_too) noexcept;

    // Reads /proc of the next `most` processes, in turn, and drops those that vanished. True if any
    // did.
    bool refresh(std::size_t most) noexcept;
    bool refresh() noexcept { return refresh(processes_.size()); }

    // Reads the parents of the processes that vanished, `most` parents at most, and drops these
    // processes. The parents' time then includes them, and children that were never found.
    void settle(std::size_t most) noexcept;

    const std::vector<Process>& processes() const noexcept { return processes_; }
    bool has(pid_t pid) noexcept { return find(pid) != nullptr; }
    std::size_t living() const noexcept;
    std::uint64_t rss_bytes() const noexcept;

    // CPU time of the tree: by the clocks of those that live, by what parents waited for, and,
    // where nobody waited, what was last seen. Exact just after a refresh of all, provided that all
    // are refreshed whenever one vanishes.
    double accounted_s() const noexcept;

    // The pid that the kernel gave out last in our namespace; -1 if unknown. born_after: whether it
    // gave out `pid` after `other`. Pids start again from the bottom when they run out.
    pid_t last_pid() const noexcept;
    bool born_after(pid_t pid, pid_t other) const noexcept;

private:
    static constexpr pid_t kFirstPid = 300;  // when pids start again: RESERVED_PIDS, kernel/pid.c

    std::vector<Process>::iterator position_of(pid_t pid) noexcept;
    Process* find(pid_t pid) noexcept;
    bool search_between(pid_t pid, pid_t last) noexcept;
    bool add(pid_t pid, const ProcessStat&) noexcept;
    bool refresh(Process&) noexcept;
    bool drop_gone() noexcept;
    void credit_parent(const Process&) noexcept;
    double accounted_s(const Process&) const noexcept;
    bool read_stat(const File&, pid_t pid, ProcessStat&) const noexcept;

    const pid_t self_, left_out_, pid_max_;
    const double tick_s_;
    const std::uint64_t page_bytes_;
    const File last_pid_, own_memory_;
    std::vector<Process> processes_;          // by pid
    std::vector<Process*> gone_;              // those that are being dropped
    std::size_t next_ = 0;                    // the next one to refresh
    pid_t searched_until_, searched_before_;  // the last pids of the last two searches
    double ended_s_ = 0.0;  // time of processes that vanished, which no parent has
};

}  // namespace pepr
