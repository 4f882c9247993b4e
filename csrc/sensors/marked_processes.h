// Processes that bear a mark in their environment, wherever they hang.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "sensors/process_tree.h"

namespace pepr {

// Finds processes that are no descendants of a tree, but were started on its behalf: by a daemon
// such as Slurm's, which gives its tasks the environment of who asked for them.
//
// The environment of a process is read one sample after its birth, and 24 later, because daemons
// fork long before they start the program. That costs 8 µs each for those that live so long, and
// nothing where no other process is born. All that a process has used since its birth counts.
class MarkedProcesses {
public:
    // `mark` is NAME=VALUE.
    explicit MarkedProcesses(const std::string& mark);

    // Adopts those born lately that are not of `tree`, which has just been followed.
    void follow(ProcessTree& tree) noexcept;

    // CPU time of all that were found. What one used after the last sample before its end is
    // missing.
    double read_s() noexcept;

    const ProcessTree& found() const noexcept { return found_; }

private:
    static constexpr std::size_t kLate = 24;

    void search_between(pid_t pid, pid_t last, ProcessTree& tree) noexcept;
    void adopt(pid_t pid, ProcessTree& tree) noexcept;
    bool bears_mark(pid_t pid) noexcept;

    const std::string mark_;              // between the NULs of an environment
    const std::unique_ptr<char[]> text_;  // of an environment
    ProcessTree found_;
    std::array<pid_t, kLate + 2> last_pids_{};  // at the last samples, newest first
    bool unsettled_ = false;                    // a process vanished at the last read
};

}  // namespace pepr
