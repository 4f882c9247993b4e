#include "sampling/readers.h"

#include <algorithm>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sys/prctl.h>

#include "system/futex.h"

namespace pepr {

namespace {

constexpr std::int64_t kMs = 1'000'000, kForever = INT64_MAX;

// Quick is a read of up to a 16th of what lies between the reads of any other lane; below 20 µs it
// always is, above 1 ms never. Lanes are read together that were quick so many times in a row, or
// for 2 s and 4 times: what is slow now and then delays the others by as little, and so seldom.
constexpr std::int64_t kQuickShare = 16;
constexpr std::int64_t kAlwaysQuickNs = 20'000, kNeverQuickNs = kMs;
constexpr int kProof = 16;

// A leader so long in one read is taken to hang; somebody looks so often while it does not sleep.
constexpr std::int64_t kPatienceNs = 100 * kMs, kLookNs = 250 * kMs;

using LanePtr = std::shared_ptr<Lane>;
using Lock = std::unique_lock<std::mutex>;

void remove(std::vector<LanePtr>& lanes, const LanePtr& lane) {
    lanes.erase(std::remove(lanes.begin(), lanes.end(), lane), lanes.end());
}

}  // namespace

struct Readers::State {
    struct Member {
        LanePtr lane;
        std::thread::id reader{};  // who reads it, or did last
        int quick = 0;             // reads in a row, seldom ones worth more
        bool stopping = false;
    };

    const std::int64_t epoch_ns = now_ns();
    std::mutex mutex;                      // of all that follows, but for `changes`
    std::vector<Member> members;           // lanes that have not ended
    std::vector<LanePtr> shared;           // of these, those that the leader reads
    std::vector<std::thread> threads;      // as many as members, but for a moment
    std::vector<std::thread> ended;        // to be joined
    std::uint64_t turns = 0, leading = 0;  // leading 0: nobody leads
    bool watched = false;                  // somebody looks after the leader
    LanePtr busy;                          // what the leader reads
    std::int64_t busy_since_ns = 0, wakes_ns = 0;
    std::atomic<std::uint32_t> changes{0};  // what all threads sleep on

    void changed() noexcept {
        changes.fetch_add(1, std::memory_order_release);
        wake_all(changes);
    }

    void wait(Lock& lock, std::int64_t deadline_ns) noexcept {
        const std::uint32_t seen = changes.load(std::memory_order_acquire);
        lock.unlock();
        wait_while(changes, seen, deadline_ns);
        lock.lock();
    }

    Member* find(const LanePtr& lane) noexcept {
        const auto at = std::find_if(members.begin(), members.end(),
                                     [&](const Member& member) { return member.lane == lane; });
        return at != members.end() ? &*at : nullptr;
    }

    void forget(const LanePtr& lane) noexcept {
        remove(shared, lane);
        if (const Member* const member = find(lane))
            members.erase(members.begin() + (member - members.data()));
        changed();
    }

    // --- the life of a thread ---

    void work(LanePtr lane) noexcept {
        ::pthread_setname_np(::pthread_self(), "pepr-sampler");
        // The default slack of 50 µs would make every wake-up that late (median 62 µs against 12).
        ::prctl(PR_SET_TIMERSLACK, 1);
        CpuLaps laps;
        const bool opened = lane->open();
        Lock lock(mutex);
        if (!opened && find(lane) != nullptr) {
            forget(lane);
            lane = nullptr;
        }
        for (;;) {
            if (lane != nullptr && find(lane) == nullptr) return;  // given up, and left behind
            if (lane != nullptr) {
                lane = keep(lock, std::move(lane), laps);
            } else if (threads.size() > members.size()) {
                ended.push_back(take(std::this_thread::get_id()));
                return changed();
            } else if (leading == 0 && !shared.empty()) {
                lane = lead(lock, laps);
            } else {
                follow(lock, laps);
            }
        }
    }

    std::thread take(std::thread::id id) noexcept {
        const auto at = std::find_if(threads.begin(), threads.end(),
                                     [id](const std::thread& t) { return t.get_id() == id; });
        std::thread taken = std::move(*at);
        threads.erase(at);
        return taken;
    }

    // A lane of our own, until its next read. What is left to us: it, or nothing.
    LanePtr keep(Lock& lock, LanePtr lane, CpuLaps& laps) noexcept {
        const bool last = find(lane)->stopping, alone = members.size() == 1;
        if (!last && now_ns() < lane->due_ns()) {
            const std::uint32_t seen = changes.load(std::memory_order_acquire);
            lock.unlock();
            // Who was alone needs no lock until something changes: it took a tenth of the CPU time.
            while (!wait_while(changes, seen, lane->due_ns()) && alone) lane->read(false, laps);
            lock.lock();
            return lane;
        }
        if (!read(lock, lane, last, laps)) return lane;
        if (last) {
            forget(lane);
        } else if (alone || find(lane)->quick < kProof) {
            return lane;
        } else {
            lane->charge(laps);
            shared.push_back(lane);
            changed();
        }
        return nullptr;
    }

    // Reads a lane without holding the lock. False: it was given up meanwhile.
    bool read(Lock& lock, const LanePtr& lane, bool last, CpuLaps& laps) noexcept {
        find(lane)->reader = std::this_thread::get_id();
        lock.unlock();
        lane->read(last, laps);
        lock.lock();
        Member* const member = find(lane);
        if (member == nullptr) return false;
        const std::int64_t worth = lane->spacing_ns() * 8 / kNsPerS;
        const int proof = static_cast<int>(std::clamp<std::int64_t>(worth, 1, kProof / 4));
        member->quick = lane->took_ns() <= quick_ns(lane) ? member->quick + proof : 0;
        return true;
    }

    std::int64_t quick_ns(const LanePtr& lane) const noexcept {
        std::int64_t most_ns = kNeverQuickNs;
        for (const Member& other : members)
            if (other.lane != lane)
                most_ns = std::min(most_ns, other.lane->spacing_ns() / kQuickShare);
        return std::max(most_ns, kAlwaysQuickNs);
    }

    // Reads what is shared until nothing is, or until a lane proves slow: that is what is left.
    LanePtr lead(Lock& lock, CpuLaps& laps) noexcept {
        const std::uint64_t turn = leading = ++turns;
        changed();  // somebody has to look after us
        while (!shared.empty()) {
            wakes_ns = next_wake_ns();
            if (now_ns() < wakes_ns) wait(lock, wakes_ns);
            if (leading != turn) return nullptr;
            std::int64_t t_ns = now_ns();
            if (t_ns < next_wake_ns()) continue;
            // Those that cannot wait first: when they are read next, others may go along.
            for (const bool elastic : {false, true})
                for (std::size_t i = 0; i < shared.size(); ++i) {
                    const LanePtr lane = shared[i];
                    const bool last = find(lane)->stopping;
                    if (!last && (lane->is_elastic() != elastic || !wants(*lane, t_ns))) continue;
                    busy = lane;
                    busy_since_ns = t_ns;
                    const bool known = read(lock, lane, last, laps);
                    lane->charge(laps);
                    if (leading != turn || !known) return lane;
                    if (last) {
                        forget(lane);
                        --i;
                    } else if (find(lane)->quick == 0) {
                        depose();
                        return lane;
                    }
                    busy = nullptr;
                    t_ns = now_ns();
                }
        }
        leading = 0;
        return nullptr;
    }

    // Who is due, and who may go along now but with no later wake-up.
    bool wants(const Lane& lane, std::int64_t t_ns) const noexcept {
        const bool in_time = next_rigid_ns() <= lane.latest_ns();
        return t_ns >= (in_time ? lane.due_ns() : lane.earliest_ns());
    }

    std::int64_t next_rigid_ns() const noexcept {
        std::int64_t rigid_ns = kForever;
        for (const LanePtr& lane : shared)
            if (!lane->is_elastic()) rigid_ns = std::min(rigid_ns, lane->due_ns());
        return rigid_ns;
    }

    std::int64_t next_wake_ns() noexcept {
        const std::int64_t rigid_ns = next_rigid_ns();
        std::int64_t wake_ns = rigid_ns;
        for (const LanePtr& lane : shared) {
            if (find(lane)->stopping) return 0;
            if (rigid_ns > lane->latest_ns()) wake_ns = std::min(wake_ns, lane->due_ns());
        }
        return wake_ns;
    }

    void follow(Lock& lock, CpuLaps& laps) noexcept {
        if (watched || leading == 0 || shared.size() < 2) return wait(lock, kForever);
        watched = true;
        wait(lock, std::max(now_ns() + kLookNs, wakes_ns + 5 * kPatienceNs / 4));
        watched = false;
        if (!shared.empty()) shared.front()->charge(laps);
        depose_who_hangs();
    }

    void depose_who_hangs() noexcept {
        if (busy != nullptr && now_ns() - busy_since_ns > kPatienceNs) depose();
    }

    // What it reads is left to it.
    void depose() noexcept {
        remove(shared, busy);
        busy = nullptr;
        leading = 0;
        changed();
    }

    // --- from outside ---

    // The thread that is in a read of it stays behind.
    void give_up(const LanePtr& lane) noexcept {
        const bool is_read =
            busy == lane || std::find(shared.begin(), shared.end(), lane) == shared.end();
        const std::thread::id reader = find(lane)->reader;
        if (busy == lane) depose();
        forget(lane);
        if (is_read) take(reader).detach();
    }
};

Readers::Readers() : state_(std::make_shared<State>()) {}

std::shared_ptr<Lane> Readers::add(Lane::How how) {
    State& state = *state_;
    const auto lane = std::make_shared<Lane>(std::move(how), state.epoch_ns);
    const Lock lock(state.mutex);
    state.members.reserve(state.members.size() + 1);
    state.shared.reserve(state.members.size() + 1);  // who reads allocates nothing
    state.threads.emplace_back([keep = state_, lane] { keep->work(lane); });
    state.members.push_back({lane, state.threads.back().get_id()});
    return lane;
}

bool Readers::stop(const std::shared_ptr<Lane>& lane, std::int64_t timeout_ns) {
    State& state = *state_;
    const std::int64_t deadline_ns = now_ns() + timeout_ns;
    std::vector<std::thread> ended;
    bool in_time = true;
    {
        Lock lock(state.mutex);
        if (State::Member* const member = state.find(lane)) member->stopping = true;
        state.changed();
        while (in_time && state.find(lane) != nullptr) {
            state.wait(lock, std::min(deadline_ns, now_ns() + kPatienceNs / 2));
            state.depose_who_hangs();
            in_time = now_ns() < deadline_ns || state.find(lane) == nullptr;
        }
        if (!in_time) state.give_up(lane);
        // One thread is too many now. It sleeps, or comes from a read.
        const std::int64_t patience_ns = now_ns() + kNsPerS;
        while (state.threads.size() > state.members.size() && now_ns() < patience_ns)
            state.wait(lock, patience_ns);
        ended.swap(state.ended);
    }
    for (std::thread& thread : ended) thread.join();
    return in_time;
}

void Readers::leak() const { new std::shared_ptr<State>(state_); }

}  // namespace pepr
