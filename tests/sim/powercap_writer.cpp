// Keeps a powercap tree's energy_uj files moving. usage: powercap_writer SPEC PARENT_PID
//
// A reader must never see half a number, and a page-cache read takes no lock against a writer. What
// both sides do whole is an aligned word, so a value changes within its first eight bytes: beyond
// eight digits the rest is zeros. The rest itself changes only where the number of digits does
// (100 J, 1 kJ, ..., a wrap), then with one store of 16 aligned bytes.
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <system_error>

#include "waves.h"

namespace {

using namespace pepr::sim;
namespace fs = std::filesystem;

constexpr std::size_t kSize = 16;

void check(bool good, const std::string& what) {
    if (!good) throw std::system_error(errno, std::generic_category(), what);
}

struct Fault {
    std::string effect;
    double start_s, end_s;
};

std::string digits(long long value_uj) {
    auto text = std::to_string(value_uj);
    if (text.size() > 8) std::fill(text.begin() + 8, text.end(), '0');
    return text;
}

class Zone {
public:
    Zone(long long range_uj, long long start_uj, fs::path path, fs::path link)
        : range_uj_(range_uj), start_uj_(start_uj), path_(std::move(path)), link_(std::move(link)) {
        const auto file = path_ / "energy_uj";
        // Never closed: it lives as long as the process does.
        fd_ = open(file.c_str(), O_RDWR | O_CLOEXEC);
        check(fd_ >= 0, file);
        check(fchmod(fd_, kMode) == 0, file);
        page_ = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
        check(page_ != MAP_FAILED, file);
    }

    void update(double t_s) {
        const auto now = [&](const char* effect) {
            for (const auto& fault : faults) {
                if (fault.effect == effect && fault.start_s <= t_s && t_s < fault.end_s)
                    return true;
            }
            return false;
        };
        if (gone_) return;
        if (now("vanish")) return vanish();
        set_mode(now("deny") ? 0 : kMode);
        if (now("empty")) return set_empty();
        show(now("garbage") ? "garbage" : digits(counter_uj(t_s)));
    }

    Wave wave;
    std::vector<Fault> faults;

private:
    static constexpr mode_t kMode = 0400;  // since CVE-2020-8694

    long long counter_uj(double t_s) const {
        double from_s = 0, start_uj = static_cast<double>(start_uj_);
        for (const auto& fault : faults) {
            if (fault.effect == "stall" && fault.start_s <= t_s && t_s < fault.end_s)
                t_s = fault.start_s;
        }
        for (const auto& fault : faults) {
            if (fault.effect == "reset" && fault.start_s <= t_s) {
                from_s = fault.start_s;
                start_uj = 0;
            }
        }
        const double passed_j = wave.integral_j(t_s) - wave.integral_j(from_s);
        return static_cast<long long>(start_uj + 1e6 * passed_j) % range_uj_;
    }

    void show(const std::string& text) {
        typedef long long Pair __attribute__((vector_size(kSize)));
        alignas(kSize) char bytes[kSize];
        std::memset(bytes, '\n', kSize);
        std::memcpy(bytes, text.data(), std::min(text.size(), kSize - 1));
        if (empty_) {  // not through the map: growing the file first would show zero bytes
            check(pwrite(fd_, bytes, kSize, 0) == kSize, path_);
            empty_ = false;
        }
        Pair pair;
        std::memcpy(&pair, bytes, kSize);
        *static_cast<volatile Pair*>(page_) = pair;
    }

    void set_mode(mode_t mode) {
        if (mode != mode_) check(fchmod(fd_, mode) == 0, path_);
        mode_ = mode;
    }

    void set_empty() {
        if (!empty_) check(ftruncate(fd_, 0) == 0, path_);
        empty_ = true;
    }

    void vanish() {
        set_empty();
        fs::remove(link_);
        fs::remove_all(path_);
        gone_ = true;
    }

    long long range_uj_, start_uj_;
    fs::path path_, link_;
    int fd_ = -1;
    void* page_ = nullptr;
    mode_t mode_ = kMode;
    bool empty_ = false, gone_ = false;
};

struct Tree {
    explicit Tree(const char* spec) {
        std::ifstream file(spec);
        std::string text;
        while (std::getline(file, text)) {
            Line line(text);
            if (line.done()) continue;
            const auto key = line.word();
            if (key == "epoch_ns")
                epoch_ns = line.number<long long>();
            else if (key == "period_ns")
                period_ns = line.number<long long>();
            else if (key == "class")
                links = line.rest();
            else if (key == "late")
                late_file = line.rest();
            else if (key == "zone") {
                const auto range_uj = line.number<long long>(), start_uj = line.number<long long>();
                const fs::path path = line.rest();
                zones.emplace_back(range_uj, start_uj, path, links / path.filename());
            } else if (key == "power")
                zones.back().wave = Wave(line);
            else if (key == "fault") {
                auto effect = line.word();
                const double start_s = line.number(), end_s = line.number();
                zones.back().faults.push_back({std::move(effect), start_s, end_s});
            } else
                throw std::runtime_error("no such directive: " + key);
        }
    }

    // Like the hardware's, each refresh is at a whole period; a late one shows the latest instant.
    long long update() {
        const auto tick = (monotonic_ns() - epoch_ns) / period_ns;
        for (auto& zone : zones) zone.update(static_cast<double>(tick * period_ns) * 1e-9);
        return epoch_ns + (tick + 1) * period_ns;
    }

    long long epoch_ns = 0, period_ns = 1'000'000;
    fs::path links, late_file;
    std::vector<Zone> zones;
};

}  // namespace

int main(int, char** argv) try {
    check(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0, "PR_SET_PDEATHSIG");
    if (getppid() != std::stoi(argv[2])) return 0;  // it died before we could ask
    prctl(PR_SET_TIMERSLACK, 1UL);
    const sched_param priority{10};
    sched_setscheduler(0, SCHED_FIFO, &priority);  // punctual beside busy tests; not always allowed

    Tree tree(argv[1]);
    const int late_fd = open(tree.late_file.c_str(), O_RDWR | O_CLOEXEC);
    check(late_fd >= 0, tree.late_file);
    void* page = mmap(nullptr, sizeof(long long), PROT_WRITE, MAP_SHARED, late_fd, 0);
    check(page != MAP_FAILED, tree.late_file);
    auto* const late_ns = static_cast<volatile long long*>(page);
    long long next_ns = tree.update(), worst_ns = 0;
    std::cout << "ready" << std::endl;
    for (;;) {
        const timespec until{next_ns / 1'000'000'000, next_ns % 1'000'000'000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
        const auto due_ns = next_ns;
        next_ns = tree.update();
        worst_ns = std::max(worst_ns, monotonic_ns() - due_ns);
        *late_ns = worst_ns;
    }
} catch (const std::exception& error) {
    std::cerr << "powercap_writer: " << error.what() << '\n';
    return 1;
}
