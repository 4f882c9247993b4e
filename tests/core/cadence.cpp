// How the cadence learns and follows the refreshes of sensors, in virtual time.

#include <random>
#include <string>
#include <vector>

#include "core_test.h"
#include "sampling/cadence.h"

namespace {

// A sensor in virtual time: its refreshes are known, so what a reader missed is too.
struct Refreshes {
    double period_ms, jitter_ms, phase_ms;
    double from_s = 1e9, then_ms = 0;           // the period from then on
    double still_from_s = 1e9, still_to_s = 0;  // refreshes that change nothing
    bool walks = true;                          // jitter adds up
};

struct Followed {
    std::int64_t reads = 0, settled = 0, wasted = 0;  // wasted of the settled
    std::int64_t seen = 0, missed = 0;                // of all devices, after learn_s
    std::int64_t longest_ns = 0, late_ns = 0;         // the mean lag behind a refresh
    std::int64_t refresh_ns = 0;
    double wasted_share() const {
        return settled > 0 ? static_cast<double>(wasted) / static_cast<double>(settled) : 0.0;
    }
};

Followed follow(const std::vector<Refreshes>& devices, std::int64_t base_ns, double duration_s,
                double learn_s, double modulus_j = 0) {
    std::mt19937 random(7);
    std::vector<pepr::Channel> channels;
    std::vector<std::vector<std::int64_t>> edges;
    for (const Refreshes& device : devices) {
        pepr::Channel channel;
        channel.name = "device" + std::to_string(channels.size()) + "/energy";
        channel.quantity = "energy";
        channel.counter = true;
        channel.modulus = modulus_j;
        channels.push_back(channel);
        std::vector<std::int64_t>& at_ns = edges.emplace_back();
        std::uniform_real_distribution<double> jitter(-device.jitter_ms, device.jitter_ms);
        for (double t_ms = device.phase_ms, grid_ms = t_ms; t_ms < 1e3 * duration_s;) {
            if (t_ms < 1e3 * device.still_from_s || t_ms >= 1e3 * device.still_to_s)
                at_ns.push_back(static_cast<std::int64_t>(1e6 * t_ms));
            grid_ms += t_ms > 1e3 * device.from_s ? device.then_ms : device.period_ms;
            const double next_ms = grid_ms + jitter(random);
            if (device.walks) grid_ms = next_ms;
            t_ms = next_ms;
        }
    }
    pepr::Cadence cadence(channels, base_ns);
    std::exponential_distribution<double> lateness_ms(1 / 0.06);
    std::vector<double> row(devices.size());
    std::vector<std::size_t> counts(devices.size(), 0);
    Followed result;
    double lag_ns = 0;
    const auto end_ns = static_cast<std::int64_t>(1e9 * duration_s);
    for (std::int64_t t_ns = 0; t_ns < end_ns;) {
        for (std::size_t i = 0; i < devices.size(); ++i) {
            const std::size_t before = counts[i];
            while (counts[i] < edges[i].size() && edges[i][counts[i]] <= t_ns) ++counts[i];
            row[i] = 1000.0 + static_cast<double>(counts[i]);
            if (counts[i] == before || static_cast<double>(t_ns) < 1e9 * learn_s) continue;
            ++result.seen;
            result.missed += static_cast<std::int64_t>(counts[i] - before) - 1;
            lag_ns += static_cast<double>(t_ns - edges[i][counts[i] - 1]);
        }
        const bool settled = cadence.settled() && static_cast<double>(t_ns) >= 1e9 * learn_s;
        const bool changed = cadence.observe(t_ns, row.data());
        ++result.reads;
        if (settled) {
            ++result.settled;
            if (!changed) ++result.wasted;
        }
        const std::int64_t next_ns =
            cadence.next_ns() + static_cast<std::int64_t>(1e6 * lateness_ms(random));
        result.longest_ns = std::max(result.longest_ns, next_ns - t_ns);
        t_ns = next_ns;
    }
    result.refresh_ns = cadence.refresh_ns();
    if (result.seen > 0)
        result.late_ns = static_cast<std::int64_t>(lag_ns / static_cast<double>(result.seen));
    return result;
}

TEST(cadence_reads_just_after_each_refresh) {
    const Refreshes kSensors[] = {
        {100, 0, 37}, {101.5, 2.5, 37}, {20, 0.2, 3}, {33, 0.3, 3}, {500, 5, 3}};
    for (const Refreshes& sensor : kSensors) {
        const Followed found = follow({sensor}, 10 * kMs, 120, 5);
        const auto period_ns = static_cast<std::int64_t>(1e6 * sensor.period_ms);
        CHECK(found.missed == 0);
        CHECK(found.wasted_share() <= 0.30);
        CHECK(near(found.refresh_ns, period_ns, 0.01));
        CHECK(found.late_ns < period_ns / 12);
    }
}

TEST(cadence_holds_against_jitter_about_a_clock) {
    Refreshes sensor{100, 5, 37};
    sensor.walks = false;
    const Followed found = follow({sensor}, 10 * kMs, 120, 5);
    CHECK(found.missed == 0 && found.wasted_share() <= 0.30);
}

TEST(cadence_learns_anew_when_a_sensor_changes_its_pace) {
    const struct {
        double from_ms, to_ms;
    } kChanges[] = {{100, 20}, {20, 100}, {100, 60}, {60, 100}, {100, 95}};
    for (const auto& change : kChanges) {
        Refreshes sensor{change.from_ms, change.from_ms / 100, 37};
        sensor.from_s = 30;
        sensor.then_ms = change.to_ms;
        // a minute to notice, the next one judged
        const Followed found = follow({sensor}, 10 * kMs, 150, 90);
        CHECK(near(found.refresh_ns, static_cast<std::int64_t>(1e6 * change.to_ms), 0.02));
        CHECK(found.missed == 0 && found.wasted_share() <= 0.30);
    }
}

TEST(cadence_reads_several_devices_once_a_refresh) {
    std::vector<Refreshes> devices;
    for (int i = 0; i < 8; ++i) devices.push_back({100 + 0.05 * i, 0.5, 12.3 * i + 3});
    const Followed found = follow(devices, 10 * kMs, 120, 5);
    CHECK(found.wasted_share() <= 0.30);
    CHECK(found.missed * 1000 <= found.seen);
    CHECK(found.reads < 120 * 15);  // 10 refreshes a second; each its own would be 80
}

TEST(cadence_follows_the_fastest_of_unlike_devices) {
    const Followed found = follow({{20, 0.1, 3}, {100, 1, 50}}, 10 * kMs, 120, 5);
    CHECK(found.missed == 0 && found.wasted_share() <= 0.30);
}

// Reads a RAPL counter in uJ, which is refreshed about each ms, as a cadence of 20 ms asks for.
// Counts the reads from from_s to to_s, and the longest time between two.
struct Counted {
    std::int64_t reads = 0, widest_ns = 0;
};

template <typename Power>
Counted count_reads(const Power& power_w, double from_s, double to_s, double range_uj = 0) {
    pepr::Channel channel;
    channel.name = "package/energy";
    channel.quantity = "energy";
    channel.counter = true;
    pepr::Cadence cadence({channel}, 20 * kMs);
    std::mt19937 random(5);
    std::uniform_real_distribution<double> jitter_ms(0.9, 1.1);
    double energy_uj = 1e6, refresh_ms = 0;
    Counted found;
    for (std::int64_t t_ns = kMs, last_ns = 0; static_cast<double>(t_ns) < 1e9 * to_s;) {
        for (; 1e6 * refresh_ms <= static_cast<double>(t_ns); refresh_ms += jitter_ms(random))
            energy_uj += 1e3 * power_w(1e-3 * refresh_ms);
        if (range_uj > 0) energy_uj = std::fmod(energy_uj, range_uj);
        const double value = std::floor(energy_uj);
        cadence.observe(t_ns, &value);
        if (static_cast<double>(t_ns) >= 1e9 * from_s) {
            ++found.reads;
            found.widest_ns = std::max(found.widest_ns, t_ns - last_ns);
        }
        last_ns = t_ns;
        t_ns = cadence.next_ns();
    }
    return found;
}

TEST(cadence_keeps_to_its_base_where_each_read_sees_a_change) {
    // given power that alternates every 0.3 s
    const auto restless = [](double t_s) { return std::fmod(t_s, 0.6) < 0.3 ? 60.0 : 140.0; };
    const Counted found = count_reads(restless, 5, 65);
    CHECK(near(found.reads, 60 * 50, 0.01) && found.widest_ns < 21 * kMs);
    // and a domain that never counts does not matter
    Refreshes off{100, 0, 0.3};
    off.still_from_s = 0;
    off.still_to_s = 1e9;
    const Followed alone = follow({{1, 0, 0.3}}, 20 * kMs, 60, 5);
    const Followed beside = follow({{1, 0, 0.3}, off}, 20 * kMs, 60, 5);
    CHECK(alone.wasted == 0 && alone.refresh_ns == 0);
    CHECK(beside.wasted == 0 && near(beside.reads, alone.reads, 0.01));
}

TEST(cadence_reads_steady_power_less_often_until_it_changes) {
    // given noise of 3 %, and a step after a minute, of which nothing is known before
    std::mt19937 random(11);
    std::normal_distribution<double> noise(1, 0.03);
    const auto power_w = [&](double t_s) { return (t_s < 60 ? 100 : 160) * noise(random); };
    const Counted steady = count_reads(power_w, 10, 60);
    CHECK(near(steady.reads, 50 * 25 / 2, 0.05) && steady.widest_ns <= 80 * kMs);
    // when it has stepped, then at the base for 0.3 s, and back in 1 s
    CHECK(near(count_reads(power_w, 60.1, 60.4).reads, 15, 0.14));
    CHECK(near(count_reads(power_w, 62, 72).reads, 125, 0.05));
    // and a wrap, here every 4 s, is taken for a step, no more
    CHECK(count_reads(power_w, 10, 50, 4e8).reads <= 40 * 30);
}

TEST(cadence_does_not_take_rest_for_a_slow_sensor) {
    Refreshes sensor{100, 1, 37};
    sensor.still_from_s = 20;
    sensor.still_to_s = 3600;
    const Followed found = follow({sensor}, 10 * kMs, 3660, 3600);
    // the period is known when it moves again, from the first second on
    CHECK(near(found.refresh_ns, 100 * kMs, 0.02));
    CHECK(found.missed <= 1 && found.seen >= 590);
    CHECK(found.reads < 3660 * 13);
}

TEST(cadence_searches_a_dead_counter_for_a_while_only) {
    Refreshes off{100, 0, 0.3};
    off.still_from_s = 0;
    off.still_to_s = 1e9;
    const Followed found = follow({off}, 10 * kMs, 3600, 5);
    CHECK(found.reads < 3600 * 2);
    CHECK(found.longest_ns < kNsPerS);
}

TEST(cadence_never_sleeps_through_half_a_range) {
    Refreshes slow{5000, 0, 3};
    CHECK(follow({slow}, 10 * kMs, 60, 5).longest_ns < kNsPerS);
    // 8 kJ pass in 0.4 s at 20 kW
    CHECK(follow({slow}, 10 * kMs, 60, 5, 8000).longest_ns < 205 * kMs);
}

TEST(cadence_is_not_misled_by_unknown_values) {
    pepr::Channel channel;
    channel.name = "x/energy";
    channel.quantity = "energy";
    pepr::Cadence cadence({channel}, 10 * kMs);
    std::int64_t t_ns = 0, unknown_reads = 0;
    for (int i = 0; t_ns < 60 * kNsPerS; ++i) {
        const bool unknown = t_ns > 20 * kNsPerS && t_ns < 40 * kNsPerS;
        const double value = unknown ? pepr::kUnknown : static_cast<double>(t_ns / (100 * kMs));
        if (unknown) ++unknown_reads;
        cadence.observe(t_ns, &value);
        CHECK(cadence.next_ns() > t_ns && cadence.next_ns() <= t_ns + kNsPerS);
        t_ns = cadence.next_ns();
    }
    CHECK(near(cadence.refresh_ns(), 100 * kMs, 0.02));
    CHECK(unknown_reads < 20 * 100);
}

}  // namespace
