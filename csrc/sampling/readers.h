#pragma once

#include <memory>

#include "sampling/lane.h"

namespace pepr {

// The threads that read the lanes of a recording: as many as lanes, of which most sleep.
//
// To wake up costs a thread more than most reads do (30 to 60 µs in a virtual machine that
// leaves its idle state), so lanes that answer quickly are read by one thread, the leader, and all
// that are due in one wake-up. Leader and followers (Schmidt et al., POSA 2, 2000): should a driver
// keep the leader, another thread takes the lead of the other lanes, within 0.35 s and once: a lane
// that was slow is read by the thread that found it so, and by no other, until it has been quick
// for long.
class Readers {
public:
    Readers();

    // Adds a lane, which is opened by a thread of its own. Throws std::system_error where there can
    // be no other thread.
    std::shared_ptr<Lane> add(Lane::How how);

    // Takes one last sample and ends the lane. False: its driver did not return in time; the thread
    // is left behind, since a thread inside a hung driver cannot be ended.
    bool stop(const std::shared_ptr<Lane>& lane, std::int64_t timeout_ns);

    // In a forked child, which has our memory but not our threads: nothing may be freed under the
    // parent's feet.
    void leak() const;

private:
    struct State;
    std::shared_ptr<State> state_;  // outlives us when a thread is left behind
};

}  // namespace pepr
