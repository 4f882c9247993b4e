// Combines two measurements of a process tree's CPU time, each of which misses something.
#pragma once

#include <algorithm>

namespace pepr {

// The CPU time of a tree: the count of perf's task-clock, corrected by the account of the
// processes' own clocks wherever that knows better.
//
// The clocks include what the count misses: the time that the kernel takes to tear down an exiting
// process, which Linux 6.16 and later do not count (80 ms per GB of memory), and all that a setuid
// program does, where the kernel ends the inheritance. The clocks miss processes that end unseen.
// Only the count includes what a hypervisor steals from running tasks: this is taken off again.
class CpuTimeReconciler {
public:
    // `stolen_s`: what was stolen from the machine so far, in whole ticks.
    CpuTimeReconciler(double stolen_s, double tick_s) : taken_off_s_(stolen_s), tick_s_(tick_s) {}

    // The CPU time, from the count and the clocks' account, both since the tree was opened.
    // `changed`: a process was born or has ended since the last call. Stolen time is expensive to
    // read, so it is read only once the count runs ahead of the clocks: by a tick, or by anything
    // if `changed`, because from then on the lead may come from processes that ended unseen.
    template <typename ReadStolen>
    double update(double count_s, double accounted_s, bool changed,
                  ReadStolen read_stolen_s) noexcept {
        const double difference_s = accounted_s - count_s;
        const double lead_s = largest_difference_s_ - (changed ? difference_s_ : difference_s);
        if (lead_s > (changed ? 0.0 : tick_s_)) {
            if (const double stolen_s = read_stolen_s(); stolen_s > taken_off_s_) {
                const double off_s = std::min(lead_s, stolen_s - taken_off_s_);
                taken_off_s_ += off_s;
                correction_s_ -= off_s;
            }
            largest_difference_s_ = difference_s;
        }
        largest_difference_s_ =
            changed ? difference_s : std::max(largest_difference_s_, difference_s);
        correction_s_ = std::max(correction_s_, difference_s);
        difference_s_ = difference_s;
        return count_s + correction_s_;
    }

private:
    double correction_s_ = 0.0;  // of the count
    double difference_s_ = 0.0;  // of account and count, at the last call
    // Since a process was born or ended, or stolen time was read.
    double largest_difference_s_ = 0.0;
    double taken_off_s_;  // stolen time that was taken off the count
    double tick_s_;
};

}  // namespace pepr
