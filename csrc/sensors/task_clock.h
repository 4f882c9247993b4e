// The CPU time of a process tree, counted by the kernel's perf events.
#pragma once

#include <vector>

#include "sensors/process_tree.h"
#include "sensors/sensor.h"
#include "system/file.h"

namespace pepr {

// Opens perf's task-clock on each thread of the tree; all threads and processes that these start
// inherit it. It is exact to the ns for threads, for children however short and whoever waits for
// them, for daemons and after exec. Nothing has to be searched or followed once it is open.
//
// It takes one descriptor for each thread that runs when it is opened. A read adds up the clocks
// that a thread's children inherited, 0.1 µs each.
class TaskClock {
public:
    // Counts from here on. Throws SensorError if the kernel does not permit it.
    explicit TaskClock(ProcessTree& tree);

    std::size_t events() const noexcept { return events_.size(); }

    // CPU time, s. It includes what a hypervisor stole from running threads.
    double read_s() noexcept;

private:
    std::vector<File> events_;
    double read_s_ = 0.0;
};

// CPU time of the calling thread and of all threads and processes that it starts from here on; of
// the thread alone where the kernel does not permit perf. It goes on when the thread has ended.
class ThreadClock {
public:
    ThreadClock();
    bool counts_started() const noexcept { return static_cast<bool>(event_); }
    double read_s() noexcept;  // since it was made

private:
    const pid_t thread_;
    File event_;
    double before_s_ = 0.0, read_s_ = 0.0;
};

}  // namespace pepr
