// Lanes and samplers: first and last samples, deadlines, hanging drivers, coarse rows.

#include <random>

#include "core_test.h"
#include "sampling/coarse.h"
#include "sampling/sampler.h"
#include "system/notifier.h"

namespace {

std::string two_channels(const Folder& folder) {
    return "replay:" + folder.write("two", std::string(kChannels) + "0\t1\t2\n");
}

// Replay opens its file as any program would: a FIFO without a writer is a driver that hangs.
class HangingDriver {
public:
    HangingDriver() : path_(folder_.fifo("driver")) {}
    std::string spec() const { return "replay:" + path_; }
    void answer(const std::string& text) {
        const int fd = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);  // waits for the reader's open
        CHECK(::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
        ::close(fd);
    }

private:
    Folder folder_;
    std::string path_;
};

TEST(sampler_takes_its_last_sample_at_once) {
    const Folder folder;
    Sampler sampler({two_channels(folder), 3600 * kNsPerS});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    const std::int64_t begin_ns = now_ns();
    CHECK(sampler.stop(10 * kNsPerS));
    const std::int64_t end_ns = now_ns();
    CHECK(end_ns - begin_ns < kNsPerS);
    const Recorded rows = read_all(sampler);
    CHECK(rows.t_ns.size() == 2);
    CHECK(rows.t_ns.back() >= begin_ns && rows.t_ns.back() <= end_ns);
    CHECK(rows.columns[0] == std::vector<double>({1, 1}));
    CHECK(rows.columns[1] == std::vector<double>({2, 2}));
    CHECK(sampler.state() == Sampler::State::kStopped);
    CHECK(sampler.stop(0));  // again: nothing to do
}

TEST(sampler_follows_what_it_reads) {
    // given a counter that is refreshed every 50 ms, for 5 s
    const Folder folder;
    std::string text = "channel\ta/energy\tenergy\tJ\t1\t0\tcounter\treplay\n";
    for (int i = 0; i < 100; ++i)
        text += std::to_string(0.05 * i) + "\t" + std::to_string(i) + "\n";
    Sampler sampler({"replay:" + folder.write("steps", text), 5 * kMs, true,
                     std::make_shared<pepr::CpuBudget>(0.5)});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    Recorded rows;
    while (sampler.stats().settled < 30 && sampler.stats().samples < 900) std::this_thread::yield();
    CHECK(sampler.stop(10 * kNsPerS));
    const Sampler::Stats stats = sampler.stats();
    CHECK(near(stats.refresh_ns, 50 * kMs, 0.1));
    CHECK(stats.settled >= 30 && stats.wasted * 2 < stats.settled);
}

// However small the budget is: after more than half of its range, a wrap cannot be undone.
TEST(sampler_that_is_throttled_still_sees_every_wrap) {
    // given a counter of 4 kJ, which 20 kW fill in 200 ms, refreshed every 10 ms
    const Folder folder;
    std::string text = "channel\ta/energy\tenergy\tJ\t1\t4000\tcounter\treplay\n";
    for (int i = 0; i < 3000; ++i)
        text += std::to_string(0.01 * i) + "\t" + std::to_string(i) + "\n";
    Sampler sampler({"replay:" + folder.write("steps", text), kMs, true,
                     std::make_shared<pepr::CpuBudget>(1e-6)});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    // when the budget would have it read less often than that
    CHECK(comes_true([&] { return sampler.stats().min_spacing_ns > 500 * kMs; }));
    const std::int64_t from_ns = now_ns();
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    CHECK(sampler.stop(10 * kNsPerS));
    // then it is read every 100 ms: throttled, but no more
    const Recorded rows = read_all(sampler);
    const auto reads = std::count_if(rows.t_ns.begin(), rows.t_ns.end(),
                                     [from_ns](std::int64_t t_ns) { return t_ns > from_ns; });
    CHECK(reads >= 8 && reads <= 30);
}

TEST(sampler_stopped_before_it_is_open_still_samples_once) {
    const Folder folder;
    Sampler sampler({two_channels(folder), 3600 * kNsPerS});
    CHECK(sampler.stop(10 * kNsPerS));
    CHECK(read_all(sampler).t_ns.size() >= 1);
}

TEST(sampler_forgets_no_deadline) {
    const Folder folder;
    constexpr std::int64_t kPeriodNs = kMs;
    Sampler sampler({two_channels(folder), kPeriodNs});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    while (sampler.stats().samples < 250) std::this_thread::yield();
    CHECK(sampler.stop(10 * kNsPerS));
    const Recorded rows = read_all(sampler);
    const Sampler::Stats stats = sampler.stats();
    CHECK(rows.t_ns.size() == stats.samples);
    CHECK(stats.lost == 0);
    // The first sample, one for each deadline, the last sample. Each deadline counts once: late,
    // skipped or in time.
    const std::int64_t passed = (rows.t_ns.back() - rows.t_ns.front()) / kPeriodNs;
    const auto accounted = static_cast<std::int64_t>(stats.samples - 2 + stats.skipped);
    CHECK(std::abs(accounted - passed) <= 1);
    for (std::size_t i = 1; i < rows.t_ns.size(); ++i) CHECK(rows.t_ns[i] > rows.t_ns[i - 1]);
    for (const std::int64_t read_ns : rows.read_ns) CHECK(read_ns >= 0 && read_ns < kNsPerS);
    CHECK(stats.cpu_ns > 0 && stats.cpu_ns < rows.t_ns.back() - rows.t_ns.front());
}

TEST(sampler_makes_coarse_rows_of_the_same_reads) {
    const Folder folder;
    std::string text = "channel\ta/energy\tenergy\tJ\t0.001\t0\tcounter\treplay\n";
    for (int i = 0; i < 5000; ++i)
        text += std::to_string(0.001 * i) + "\t" + std::to_string(37 * i) + "\n";
    const std::string spec = "replay:" + folder.write("ramp", text);
    Sampler sampler({spec, kMs, false, nullptr, pepr::Coarse{10 * kMs, 0.5}});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    while (sampler.stats().samples < 300) std::this_thread::yield();
    CHECK(sampler.stop(10 * kNsPerS));
    std::vector<std::int64_t> t_ns[2], read_ns(4096);
    std::vector<double> values[2];
    for (const int coarse : {0, 1}) {
        const int fd = sampler.share(coarse == 1);
        const RingView view(fd);
        ::close(fd);
        t_ns[coarse].resize(4096);
        values[coarse].resize(4096);
        std::uint64_t cursor = 0, lost = 0;
        const std::size_t rows = view.read(
            cursor, {t_ns[coarse].data(), read_ns.data(), values[coarse].data(), 4096}, lost);
        CHECK(lost == 0 && rows > 0);
        t_ns[coarse].resize(rows);
    }
    CHECK(t_ns[0].size() == sampler.stats().samples && t_ns[1].size() <= t_ns[0].size() / 2);
    std::size_t fine = 0;
    for (std::size_t i = 0; i < t_ns[1].size(); ++i) {
        CHECK(i == 0 || t_ns[1][i] - t_ns[1][i - 1] >= 10 * kMs);
        while (fine < t_ns[0].size() && t_ns[0][fine] < t_ns[1][i]) ++fine;
        CHECK(fine < t_ns[0].size() && t_ns[0][fine] == t_ns[1][i]);
        CHECK(values[1][i] == std::floor(values[0][fine] / 500) * 500);
    }
    // a lane without a coarse ring has none to give: never the fine one instead
    Sampler open({spec, kMs});
    CHECK(open.wait_ready(10 * kNsPerS));
    bool refused = false;
    try {
        open.share(true);
    } catch (const std::logic_error&) {
        refused = true;
    }
    CHECK(refused);
}

TEST(sampler_counts_what_is_unknown) {
    const Folder folder;
    const std::string path =
        folder.write("nan", std::string(kChannels) + "0\t1\tnan\n0.1\tnan\tnan\n0.3\t3\t4\n");
    Sampler sampler({"replay:" + path, 2 * kMs});
    CHECK(sampler.wait_ready(10 * kNsPerS));
    std::uint64_t unknown = 0;
    for (bool stopped = false, done = false; !done;) {
        done = stopped;
        const Recorded rows = read_all(sampler);
        for (const auto& column : rows.columns)
            for (const double value : column) unknown += std::isnan(value) ? 1 : 0;
        if (!stopped && !rows.t_ns.empty() && rows.columns[1].back() == 4)
            stopped = sampler.stop(10 * kNsPerS);
        std::this_thread::yield();
    }
    CHECK(unknown > 0);
    CHECK(sampler.stats().failed_reads == unknown);
}

TEST(sampler_that_never_opens_is_given_up_in_time) {
    const std::size_t threads_before = thread_count();
    HangingDriver driver;
    Sampler sampler({driver.spec(), kMs});
    CHECK(!sampler.wait_ready(20 * kMs));
    CHECK(sampler.state() == Sampler::State::kOpening);
    CHECK(explains_itself([&] { sampler.channels(); }));
    CHECK(explains_itself([&] { sampler.width(); }));
    const std::int64_t begin_ns = now_ns();
    CHECK(!sampler.stop(100 * kMs));
    const std::int64_t waited_ns = now_ns() - begin_ns;
    CHECK(waited_ns >= 100 * kMs && waited_ns < 2 * kNsPerS);
    CHECK(sampler.stop(0));  // it was left behind: nothing more to wait for
    driver.answer("");       // lets the thread go, after all
    CHECK(thread_count_becomes(threads_before));
}

TEST(sampler_left_behind_outlives_its_owner) {
    HangingDriver driver;
    const std::size_t threads_before = thread_count();
    {
        const Sampler sampler({driver.spec(), kMs});
        const std::int64_t begin_ns = now_ns();
        while (thread_count() == threads_before && now_ns() < begin_ns + kNsPerS) {
        }
    }  // destroyed without stop: waits a second, then leaves the thread alone
    driver.answer(std::string(kChannels) +
                  "0\t1\t2\n");  // wakes the thread, whose memory must still be there
    CHECK(thread_count_becomes(threads_before));
}

TEST(sampler_rethrows_why_it_failed) {
    for (const char* spec : {"replay:/nowhere/at/all", "powercap:/nowhere", "nvml:/nowhere.so",
                             "magic", "processes:", "processes:parents", "processes:pids=",
                             "processes:pids=0", "processes:pids=1;2", "processes:pids=12345678"}) {
        Sampler sampler({spec, kMs});
        CHECK(explains_itself([&] { sampler.wait_ready(10 * kNsPerS); }));
        CHECK(sampler.state() == Sampler::State::kFailed);
        CHECK(explains_itself([&] { sampler.channels(); }));
        CHECK(explains_itself([&] { sampler.notes(); }));
        CHECK(sampler.stop(10 * kNsPerS));
    }
}

TEST(sampler_cycles_leave_nothing_behind) {
    const Folder folder;
    const std::string spec = two_channels(folder);
    const std::size_t files = entries_of("/proc/self/fd"), threads = thread_count();
    for (int cycle = 0; cycle < 150; ++cycle) {
        Sampler sampler({spec, kMs});
        if (cycle % 3 == 0) CHECK(sampler.wait_ready(10 * kNsPerS));
        if (cycle % 2 == 0) CHECK(sampler.stop(10 * kNsPerS));
    }
    CHECK(entries_of("/proc/self/fd") == files);
    CHECK(thread_count_becomes(threads));
}

TEST(sampler_lets_a_forked_child_go) {
    const Folder folder;
    auto sampler = std::make_unique<Sampler>(pepr::Lane::Options{two_channels(folder), kMs});
    CHECK(sampler->wait_ready(10 * kNsPerS));
    for (int round = 0; round < 20; ++round) {
        const pid_t child = ::fork();
        if (child == 0) {
            ::alarm(10);  // a child that hangs dies of it
            const bool left_alone = !sampler->stop(10 * kNsPerS);
            sampler.reset();
            ::_exit(left_alone ? 0 : 1);
        }
        int status = -1;
        CHECK(::waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    const std::uint64_t samples = sampler->stats().samples;
    CHECK(sampler->stop(10 * kNsPerS));
    CHECK(sampler->stats().samples > samples);  // the parent's lane ran on
}

TEST(coarse_rows_are_rare_and_their_errors_do_not_add_up) {
    std::vector<pepr::Channel> channels(2);
    channels[0].quantity = "energy";
    channels[0].scale = 1e-6;
    channels[1].quantity = "power";
    pepr::Coarsener coarsener(channels, {10 * kMs, 0.1});
    std::mt19937_64 random(3);
    double energy_uj = 12'345'678'901, first_uj = -1, last_uj = 0, begin_uj = 0;
    std::int64_t last_ns = -1;
    int coarse_rows = 0;
    for (std::int64_t t_ns = 0; t_ns < 3 * kNsPerS; t_ns += kMs / 2) {
        energy_uj += static_cast<double>(random() % 100'000);
        const double* row = coarsener.coarsen(t_ns, {energy_uj, 7.5});
        if (row == nullptr) continue;
        CHECK(last_ns < 0 || t_ns - last_ns >= 10 * kMs);
        CHECK(std::fmod(row[0], 100'000) == 0 && row[0] <= energy_uj &&
              energy_uj - row[0] < 100'000);
        CHECK(row[1] == 7.5);
        if (first_uj < 0) first_uj = row[0], begin_uj = energy_uj;
        last_ns = t_ns;
        last_uj = row[0];
        CHECK(std::abs((last_uj - first_uj) - (energy_uj - begin_uj)) < 100'000);
        ++coarse_rows;
    }
    CHECK(coarse_rows == 300);
    const double* unknown = coarsener.coarsen(4 * kNsPerS, {pepr::kUnknown, 1});
    CHECK(unknown != nullptr && std::isnan(unknown[0]));
}

TEST(energy_is_never_shown_finer_than_a_count_whatever_its_scale) {
    for (const double scale : {0.15, 0.2, 0.21, 1.0, 1e3, 1e300}) {
        std::vector<pepr::Channel> channels(1);
        channels[0].quantity = "energy";
        channels[0].scale = scale;
        pepr::Coarsener coarsener(channels, {kMs, 0.1});
        const double* row = coarsener.coarsen(0, {7.75});
        CHECK(row != nullptr && row[0] == 7);
    }
    for (const double scale : {0.0, -1.0, std::nan("")}) {
        std::vector<pepr::Channel> channels(1);
        channels[0].quantity = "energy";
        channels[0].scale = scale;
        pepr::Coarsener coarsener(channels, {kMs, 0.1});
        const double* row = coarsener.coarsen(0, {7.75});
        CHECK(row != nullptr && std::isnan(row[0]));
    }
}

// Energy, and a number that identifies a process.
class IdentitySensor final : public pepr::Sensor {
public:
    static std::atomic<double> who;
    IdentitySensor() {
        channels_.push_back({"a/energy", "energy", "J", 1.0, 0.0, true, "test", {}});
        channels_.push_back({"a/pid0", "identity", "1", 1.0, 0.0, false, "test", {}});
    }
    void poll(double* out) noexcept override {
        out[0] = ++count_;
        out[1] = who;
    }

private:
    double count_ = 0;
};

std::atomic<double> IdentitySensor::who{0};

TEST(lane_notifies_when_an_identity_changes) {
    const auto notifier = std::make_shared<pepr::Notifier>();
    pepr::Lane::Options how{"", kMs};
    how.notifier = notifier;
    how.open = [](const std::string&) -> std::unique_ptr<pepr::Sensor> {
        return std::make_unique<IdentitySensor>();
    };
    IdentitySensor::who = 0;
    Sampler lane(std::move(how));
    CHECK(lane.wait_ready(10 * kNsPerS));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!notifier->wait(0));  // nobody, as before
    for (const double who : {4121.0, 7.0, 0.0}) {
        IdentitySensor::who = who;
        CHECK(notifier->wait(20 * kNsPerS));
        notifier->clear();
        std::int64_t t_ns = 0, read_ns = 0;
        double values[2] = {};
        CHECK(lane.latest({&t_ns, &read_ns, values, 1}) == 1);
        CHECK(values[1] == who);  // the row can be read by now
        IdentitySensor::who = pepr::kUnknown;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(!notifier->wait(0));  // being unknown for a while is no other process
    }
}

}  // namespace
