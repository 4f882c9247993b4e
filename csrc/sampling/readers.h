// The threads that read the lanes of a recording, and which thread reads which lane.
#pragma once

#include <memory>

#include "sampling/lane.h"

namespace pepr {

// There are as many threads as lanes, but most of them sleep.
//
// A wake-up costs a thread more than most reads (30 to 60 µs in a virtual machine that leaves its
// idle state). So one thread, the leader, reads all lanes that answer quickly, and in one wake-up
// all that are due. This is the pattern Leader/Followers (Schmidt et al., POSA 2, 2000). If a
// driver hangs while the leader reads it, another thread becomes the leader within 0.35 s. That
// delays the other lanes only once: the thread that found a lane slow goes on to read it, alone,
// until the lane has been quick for long.
class Readers {
public:
    Readers();

    // Adds a lane, which a new thread opens. Throws std::system_error if no thread can be started.
    std::shared_ptr<Lane> add(Lane::Options options);

    // Takes one last sample and ends the lane. False if its driver did not return in time: a thread
    // that hangs inside a driver cannot be ended, so it is left behind.
    bool stop(const std::shared_ptr<Lane>& lane, std::int64_t timeout_ns);

    // Never frees the state. A forked child calls it: it has our memory without our threads, which
    // may have been using that memory.
    void leak() const;

private:
    struct State;
    std::shared_ptr<State> state_;  // a thread that is left behind shares it
};

}  // namespace pepr
