#pragma once

#include <algorithm>

namespace pepr {

// CPU time of a tree: the scheduler's count, put right by the clocks' account wherever that knows
// better.
//
// It knows more than the count of what the kernel does to take an exiting process apart, which
// Linux 6.16 and later leave out (80 ms a GB of memory), and of all that a setuid program does,
// where the kernel ends the inheritance. It knows of less than the count where processes end
// unseen; but what a hypervisor steals from running tasks is in the count alone.
class Reconciled {
public:
    // `stolen_s` is what was stolen of the machine so far; it is told in ticks.
    Reconciled(double stolen_s, double tick_s) : taken_off_s_(stolen_s), tick_s_(tick_s) {}

    // Both since the tree was opened; `changed`: since the last call, a process was born or has
    // ended. What was stolen, which is dear to read, is asked for only when the count has run ahead
    // of the clocks by a tick, or before it cannot be told any more from what ended unseen.
    template <typename ReadStolen>
    double take(double count_s, double accounted_s, bool changed,
                ReadStolen read_stolen_s) noexcept {
        const double apart_s = accounted_s - count_s;
        const double lead_s = most_apart_s_ - (changed ? apart_s_ : apart_s);
        if (lead_s > (changed ? 0.0 : tick_s_)) {
            if (const double stolen_s = read_stolen_s(); stolen_s > taken_off_s_) {
                const double off_s = std::min(lead_s, stolen_s - taken_off_s_);
                taken_off_s_ += off_s;
                correction_s_ -= off_s;
            }
            most_apart_s_ = apart_s;
        }
        most_apart_s_ = changed ? apart_s : std::max(most_apart_s_, apart_s);
        correction_s_ = std::max(correction_s_, apart_s);
        apart_s_ = apart_s;
        return count_s + correction_s_;
    }

private:
    double apart_s_ = 0.0, correction_s_ = 0.0;
    double most_apart_s_ = 0.0;  // since a process was born or ended, or stolen time was asked for
    double taken_off_s_;         // of the count, because it was stolen
    double tick_s_;
};

}  // namespace pepr
