#pragma once

#include <vector>

#include "sensors/process_tree.h"
#include "sensors/sensor.h"
#include "system/file.h"

namespace pepr {

// CPU time of a process tree as the scheduler counts it: perf's task-clock on each thread,
// inherited by all that these start. Exact to the ns for threads, children of any length whoever
// waits for them, daemons and exec; nothing needs to be found or followed once it is open.
//
// One descriptor a thread that ran when it was opened. The kernel adds up a thread's heirs when it
// is read: 0.1 µs each.
class TaskClock {
public:
    // Counts the tree from here on. Throws SensorError where the kernel does not let us.
    explicit TaskClock(ProcessTree& tree);

    std::size_t events() const noexcept { return events_.size(); }

    // CPU time, s, of which a hypervisor may have stolen a part.
    double read_s() noexcept;

private:
    std::vector<File> events_;
    double read_s_ = 0.0;
};

}  // namespace pepr
