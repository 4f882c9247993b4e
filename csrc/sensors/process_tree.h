#pragma once

#include <cstdint>
#include <vector>

#include <sys/types.h>

#include "sensors/process_stat.h"
#include "system/file.h"

namespace pepr {

// One process, and the account of its time. What was used before the tree was watched counts for
// nothing: it is taken off again wherever the kernel adds it to.
struct Process {
    pid_t pid;
    Stat seen;  // last; with the pid, start_ticks names one process for ever
    double before_own_s = 0.0, before_waited_s = 0.0;
    double owed_s = 0.0;     // by children that vanished: as much must turn up in waited_s
    double overdue_s = 0.0;  // what was owed when all were read last
    double foreign_s = 0.0;  // of their time, what was used before we watched
    File stat = {};          // its /proc/PID/stat, in a small tree
    bool gone = false;

    double grown_s() const noexcept { return seen.waited_s - before_waited_s; }
};

// Processes and their descendants: which there are, their memory, and what their clocks tell about
// their CPU time. Nobody is waited for, traced or stopped.
//
// New processes are found among the pids that were given out since the last look, so that looking
// costs as much as was forked, however large the tree. A process whose parent ends before the first
// look at it is not found, unless it passes to one of the tree, as a subreaper's do.
class ProcessTree {
public:
    // The own time, memory and place of `left_out` are not of the tree, wherever it is; 0: nobody.
    ProcessTree(const std::vector<pid_t>& roots, pid_t left_out);

    // Adds all descendants by walking down, and tells the threads of all. Allocates, as nothing
    // below does.
    struct Thread {
        pid_t id, process, starter;  // the process that started it
    };
    std::vector<Thread> search();

    // Time counts from here on.
    void begin() noexcept;

    // Adds what was born since the last call. True if something was, of the tree or not.
    bool follow() noexcept;

    // Reads the clocks of all, or of all but zombies, whose clocks stand still; how many processes
    // were found vanished, which refresh drops.
    std::size_t read_clocks(bool zombies_too) noexcept;

    // Reads the next `most` processes in turn, and drops those that it finds vanished. True if
    // there were any.
    bool refresh(std::size_t most) noexcept;
    bool refresh() noexcept { return refresh(processes_.size()); }

    // Reads the parents of those that were found vanished, if they are `most` at most, and drops
    // these: their parents have been told of them, and of children that nobody ever saw.
    void settle(std::size_t most) noexcept;

    const std::vector<Process>& processes() const noexcept { return processes_; }
    bool has(pid_t pid) noexcept { return find(pid) != nullptr; }
    std::size_t living() const noexcept;
    std::uint64_t rss_bytes() const noexcept;

    // CPU time by the clocks of those that live, what was waited for, and what nobody waited for as
    // far as it was seen. Right after all were refreshed, if they are whenever one has vanished.
    double accounted_s() const noexcept;

    // The pid that was given out last in our namespace, -1 if unknown; and whether `pid` was given
    // out after `other`, as pids go round.
    pid_t last_pid() const noexcept;
    bool born_after(pid_t pid, pid_t other) const noexcept;

private:
    std::vector<Process>::iterator position_of(pid_t pid) noexcept;
    Process* find(pid_t pid) noexcept;
    bool look_between(pid_t pid, pid_t last) noexcept;
    bool add(pid_t pid, const Stat&) noexcept;
    bool refresh(Process&) noexcept;
    bool drop_gone() noexcept;
    void hand_up(const Process&) noexcept;
    double accounted_s(const Process&) const noexcept;
    bool read_stat(const File&, pid_t pid, Stat&) const noexcept;

    const pid_t self_, left_out_, pid_max_;
    const double tick_s_;
    const std::uint64_t page_bytes_;
    const File last_pid_, own_memory_;
    std::vector<Process> processes_;  // by pid
    std::vector<Process*> gone_;      // while they are dropped
    std::size_t next_ = 0;            // to be refreshed
    pid_t looked_until_, looked_before_;
    double ended_s_ = 0.0;  // of processes that vanished, and that turns up nowhere
};

}  // namespace pepr
