// Lanes on disk: what the journal writes, full disks, which rows are kept.

#include <csignal>
#include <random>
#include <tuple>

#include <sys/resource.h>

#include "core_test.h"
#include "recording/arrow.h"
#include "recording/journal.h"
#include "recording/lane_file.h"
#include "recording/thin.h"
#include "system/notifier.h"

namespace {

struct Stream {
    std::size_t batches = 0, stored = 0, read = 0;  // rows that are there, and with those left out
    bool is_ended = false;
};

// Reads a stream without a schema; Arrow's format says where the numbers are.
Stream stream_in(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string data{std::istreambuf_iterator<char>(file), {}};
    const auto number = [&](std::size_t at, auto value) {
        if (at + sizeof value <= data.size()) std::memcpy(&value, &data[at], sizeof value);
        return static_cast<std::size_t>(value);
    };
    Stream stream;
    for (std::size_t at = 0; at + 8 <= data.size();) {
        const std::size_t metadata = number(at + 4, std::uint32_t{0});
        stream.is_ended = metadata == 0;
        if (stream.is_ended) break;
        const std::size_t rows = number(at + 64, std::uint64_t{0}), body = at + 8 + metadata;
        const std::size_t skipped = body + 8 * rows + (4 * rows + 7) / 8 * 8;
        for (std::size_t row = 0; row < rows; ++row)
            stream.read += number(skipped + 4 * row, std::uint32_t{0});
        stream.read += rows;
        stream.stored += rows;
        ++stream.batches;
        at = body + number(at + 32, std::uint64_t{0});
    }
    return stream;
}

std::shared_ptr<pepr::LaneFile> file_of(const Folder& folder, const char* name) {
    const std::string stem = folder.write(name, "");
    return std::make_shared<pepr::LaneFile>(
        pepr::LaneFile::Options{stem, "", {{pepr::ThinRule::Kind::kLine, 0.25}}});
}

TEST(journal_writes_each_row_once_with_two_threads_that_flush) {
    const Folder folder;
    const auto notifier = std::make_shared<pepr::Notifier>();
    const auto readers = std::make_shared<pepr::Readers>();
    Sampler a(FakeSensor::options(0, kMs), readers), b(FakeSensor::options(1, kMs), readers);
    CHECK(a.wait_ready(10 * kNsPerS) && b.wait_ready(10 * kNsPerS));
    const auto of_a = file_of(folder, "a"), of_b = file_of(folder, "b");
    pepr::Journal journal(3 * kMs, notifier);
    journal.add(a.lane(), of_a);
    const std::string tail = folder.write("a", "") + ".tail.arrows";
    CHECK(comes_true([&] { return stream_in(tail).read > 0; }));  // by itself
    journal.add(b.lane(), of_b);
    CHECK(comes_true([&] {
        journal.flush();
        return FakeSensor::states[0].reads > 1500 && FakeSensor::states[1].reads > 100;
    }));
    CHECK(journal.cpu_ns() > 0);
    CHECK(a.stop(10 * kNsPerS) && b.stop(10 * kNsPerS));
    journal.stop();
    journal.flush();
    for (const auto& [file, sampler, name] : {std::tuple{of_a, &a, "a"}, {of_b, &b, "b"}}) {
        file->flush(true);
        const std::string stem = folder.write(name, "");
        const Stream whole = stream_in(stem + ".arrows");
        CHECK(whole.read + file->lost_rows() == sampler->stats().samples);
        CHECK(whole.is_ended && !fs::exists(stem + ".tail.arrows"));
        CHECK(file->error() == 0 && file->dropped_rows() == 0);
    }
    CHECK(stream_in(folder.write("a", "") + ".arrows").batches > 1);
    CHECK(!notifier->wait(0));
}

TEST(journal_notifies_when_a_disk_is_full_and_when_no_longer) {
    const Folder folder;
    const auto notifier = std::make_shared<pepr::Notifier>();
    Sampler lane(FakeSensor::options(0, kMs));
    CHECK(lane.wait_ready(10 * kNsPerS));
    const auto file = file_of(folder, "a");
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{};
    CHECK(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
    const rlimit little{4096, limit.rlim_max};
    CHECK(::setrlimit(RLIMIT_FSIZE, &little) == 0);
    pepr::Journal journal(2 * kMs, notifier);
    journal.add(lane.lane(), file);
    CHECK(notifier->wait(20 * kNsPerS));
    CHECK(file->error() == EFBIG);
    notifier->clear();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!notifier->wait(0));  // it still is: nobody is notified
    CHECK(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(notifier->wait(20 * kNsPerS));
    CHECK(file->error() == 0);
    CHECK(lane.stop(10 * kNsPerS));
    journal.stop();
    journal.flush();
    file->flush(true);
    CHECK(file->dropped_rows() == 0);
    CHECK(stream_in(folder.write("a", "") + ".arrows").read == lane.stats().samples);
}

TEST(arrow_file_is_written_over_in_its_own_space_or_left_alone) {
    const Folder folder;
    const std::string path = folder.write("a", "");
    const auto content = [&] {
        std::ifstream file(path, std::ios::binary);
        return std::string{std::istreambuf_iterator<char>(file), {}};
    };
    pepr::ArrowFile file(path, "schema");
    CHECK(file.replace("row") == ENOSPC);  // it has no space of its own yet
    CHECK(file.append("first second") == 0);
    CHECK(file.replace("more than there was") == ENOSPC);
    CHECK(content() == "schemafirst second");
    CHECK(file.replace("fewer") == 0);
    CHECK(content() == "schemafewer" && file.size() == content().size());
    CHECK(file.append(" third") == 0 && content() == "schemafewer third");
}

TEST(lane_whose_files_were_removed_goes_on_elsewhere_with_all_of_its_rows) {
    const Folder folder;
    const auto file = file_of(folder, "a");
    std::int64_t t_ns = 1, took_ns = 1;
    double value = 0;
    const auto add = [&](int rows) {
        for (; rows > 0; --rows, t_ns += kMs, value += 1)
            file->append({&t_ns, &took_ns, &value, 1}, 1);
        file->flush();
    };
    add(1500);  // some in the main file, some in the tail
    add(10);
    const std::string from = folder.write("a", ""), to = folder.write("b", "");
    fs::remove(from + ".arrows");
    fs::remove(from + ".tail.arrows");
    CHECK(file->move_to("/nowhere/b") == ENOENT);  // then it stays as it is
    add(10);
    CHECK(file->error() == 0 && file->move_to(to) == 0);
    CHECK(stream_in(to + ".arrows").read == 1500 && stream_in(to + ".tail.arrows").read == 20);
    add(10);
    file->flush(true);
    CHECK(stream_in(to + ".arrows").read == 1530 && stream_in(to + ".arrows").is_ended);
    CHECK(!fs::exists(to + ".tail.arrows") && !fs::exists(from + ".arrows"));
}

TEST(journal_writes_soon_when_a_lane_is_added) {
    const Folder folder;
    Sampler lane(FakeSensor::options(0, kMs));
    CHECK(lane.wait_ready(10 * kNsPerS));
    pepr::Journal journal(64 * kNsPerS, std::make_shared<pepr::Notifier>());
    journal.add(lane.lane(), file_of(folder, "a"));
    const std::string tail = folder.write("a", "") + ".tail.arrows";
    CHECK(comes_true([&] { return stream_in(tail).read > 0; }));
    CHECK(lane.stop(10 * kNsPerS));
}

// A counter in J that is read every 10 ms: 100 W, 300 W from 5 s on, and 2 s without a read at 10
// s.
TEST(thinning_keeps_what_a_line_does_not_say) {
    constexpr std::size_t kRows = 1500;
    std::vector<std::int64_t> t_ns(kRows);
    std::vector<double> energy_j(kRows);
    for (std::size_t i = 1; i < kRows; ++i) {
        t_ns[i] = t_ns[i - 1] + (i == 1000 ? 2000 : 10) * kMs;
        const double power_w = t_ns[i] <= 5 * kNsPerS ? 100 : 300;
        energy_j[i] = energy_j[i - 1] + 1e-9 * static_cast<double>(t_ns[i] - t_ns[i - 1]) * power_w;
    }
    const std::vector<std::size_t> kept = pepr::thin(
        {{pepr::ThinRule::Kind::kLine, 0.25}}, t_ns.data(), energy_j.data(), kRows, kRows, 64);
    const auto has = [&](std::size_t row) {
        return std::binary_search(kept.begin(), kept.end(), row);
    };
    CHECK(std::is_sorted(kept.begin(), kept.end()) && kept.size() < 64 + 16);
    for (std::size_t row = 0; row < 64; ++row) CHECK(has(row));
    CHECK(has(999) && has(1000) && has(kRows - 1));  // around the gap, and the last one
    for (std::size_t k = 1; k < kept.size(); ++k) {
        const std::size_t from = kept[k - 1], to = kept[k];
        CHECK(t_ns[to] - t_ns[from] <= pepr::kThinLongestNs);
        const double slope =
            (energy_j[to] - energy_j[from]) / static_cast<double>(t_ns[to] - t_ns[from]);
        for (std::size_t row = from; row < to; ++row) {
            const double line_j =
                energy_j[from] + slope * static_cast<double>(t_ns[row] - t_ns[from]);
            CHECK(std::abs(energy_j[row] - line_j) <= 0.25 * 3);  // of a step of 3 J
        }
    }
}

TEST(refresh_periods_are_learnt_from_the_first_changes) {
    std::vector<std::int64_t> t_ns;
    std::vector<double> values;
    for (std::int64_t i = 0; i < 400; ++i) {  // changes each 100 ms, after 20 of them each 300 ms
        t_ns.push_back(10 * kMs * i);
        values.push_back(static_cast<double>(i < 200 ? i / 10 : 20 + (i - 200) / 30));
    }
    CHECK(std::abs(pepr::first_interval_s(values.data(), t_ns.data(), 400) - 0.1) < 1e-9);
    CHECK(std::abs(pepr::first_interval_s(values.data(), t_ns.data(), 31) - 0.1) < 1e-9);
    CHECK(pepr::first_interval_s(values.data(), t_ns.data(), 30) == 0.0);  // two changes only
}

TEST(journal_cycles_leave_nothing_behind_and_a_forked_child_goes) {
    const Folder folder;
    const std::size_t threads = thread_count(), files = entries_of("/proc/self/fd");
    {
        Sampler lane(FakeSensor::options(0, kMs));
        CHECK(lane.wait_ready(10 * kNsPerS));
        for (int cycle = 0; cycle < 40; ++cycle) {
            auto journal = std::make_unique<pepr::Journal>(kMs, std::make_shared<pepr::Notifier>());
            journal->add(lane.lane(), file_of(folder, "a"));
            if (cycle % 4 == 0) {
                const pid_t child = ::fork();
                if (child == 0) {
                    ::alarm(10);  // a child that hangs dies of it
                    journal->stop();
                    journal.reset();
                    ::_exit(0);
                }
                int status = -1;
                CHECK(::waitpid(child, &status, 0) == child);
                CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
            }
            if (cycle % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
        }
    }
    CHECK(thread_count_becomes(threads) && entries_of("/proc/self/fd") == files);
}

}  // namespace
