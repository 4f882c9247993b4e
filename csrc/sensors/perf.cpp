// RAPL through the kernel's perf events: 64-bit counters that do not wrap, one system call for each
// socket.
//
// `perf[:SYSFS]` reads the PMU `power`, `perf-core[:SYSFS]` the PMU `power_core` (AMD, one counter
// for each core). SYSFS/bus/event_source/devices/PMU says which events exist, their encoding, scale
// and unit, and on which CPUs to read them.

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>

#include <linux/perf_event.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sensors/sensor.h"
#include "system/file.h"
#include "system/numbers.h"

namespace pepr {

namespace {

namespace fs = std::filesystem;

struct Event {
    std::string name;  // "energy-pkg"
    std::array<std::uint64_t, 3> config;
    double scale;
};

// The numbers of a list such as "0,2-4", which cpumask and format files use.
std::vector<int> parse_list(const std::string& text) {
    std::vector<int> numbers;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) {
        char* rest = nullptr;
        const long first = std::strtol(part.c_str(), &rest, 10);
        const long last = *rest == '-' ? std::strtol(rest + 1, nullptr, 10) : first;
        for (long n = first; n <= last; ++n) numbers.push_back(static_cast<int>(n));
    }
    return numbers;
}

class Perf final : public Sensor {
public:
    Perf(const std::string& pmu, const fs::path& sysfs)
        : pmu_(pmu), sysfs_(sysfs), directory_(sysfs / "bus/event_source/devices" / pmu) {
        const std::string type = read_text(directory_ / "type");
        if (type.empty())
            throw SensorError("no perf events for energy", "the kernel has no PMU '" + pmu + "'",
                              "load it: sudo modprobe rapl; virtual machines have none");
        const std::vector<Event> events = find_events();
        if (events.empty())
            throw SensorError("no perf events for energy",
                              "the PMU '" + pmu + "' counts no joules, as in virtual machines",
                              "measure on the machine that hosts this one");
        const auto type_number =
            static_cast<std::uint32_t>(std::strtoul(type.c_str(), nullptr, 10));
        for (const int cpu : parse_list(read_text(directory_ / "cpumask")))
            open_group(type_number, cpu, events);
        if (channels_.empty()) {
            Note note = notes_.empty()
                            ? Note{"", "its cpumask is empty", "check " + directory_.string()}
                            : notes_[0];
            note.what = "perf events for energy cannot be opened";
            throw SensorError(std::move(note));
        }
    }

    void poll(double* out) noexcept override {
        for (const Group& group : groups_) {
            std::array<std::uint64_t, 1 + kMostEvents> values{};
            const File& leader = group.files[0];
            const ssize_t wanted =
                static_cast<ssize_t>((1 + group.files.size()) * sizeof values[0]);
            const bool ok =
                leader.is_ours() && ::read(leader.fd(), values.data(), sizeof values) == wanted;
            for (std::size_t i = 0; i < group.files.size(); ++i)
                *out++ = ok ? static_cast<double>(values[1 + i]) : kUnknown;
        }
    }

private:
    static constexpr std::size_t kMostEvents = 16;

    struct Group {
        std::vector<File> files;  // one read of the first, the group leader, returns all counters
    };

    std::vector<Event> find_events() const {
        std::vector<Event> events;
        std::error_code error;
        for (const fs::path& path : list_directory(directory_ / "events", error)) {
            const std::string name = path.filename();
            if (name.rfind("energy-", 0) != 0 || name.find('.') != std::string::npos) continue;
            if (events.size() == kMostEvents || read_text(path.string() + ".unit") != "Joules")
                continue;
            const std::string scale = read_text(path.string() + ".scale");
            events.push_back({path.filename(), encode(read_text(path)),
                              scale.empty() ? 1.0 : to_double(scale.c_str())});
        }
        return events;
    }

    // Encodes "event=0x02,umask=1" with the bit ranges in format/event and format/umask.
    std::array<std::uint64_t, 3> encode(const std::string& text) const {
        std::array<std::uint64_t, 3> config{};
        std::istringstream stream(text);
        for (std::string term; std::getline(stream, term, ',');) {
            const auto equals = term.find('=');
            std::uint64_t value = 1;
            if (equals != std::string::npos)
                value = std::strtoull(term.c_str() + equals + 1, nullptr, 0);
            const std::string format = read_text(directory_ / "format" / term.substr(0, equals));
            const auto colon = format.find(':');
            if (colon == std::string::npos) continue;
            const std::string word = format.substr(0, colon);
            auto& target = config.at(word == "config1" ? 1 : word == "config2" ? 2 : 0);
            for (const int bit : parse_list(format.substr(colon + 1))) {
                if (bit >= 0 && bit < 64) target |= (value & 1) << bit;
                value >>= 1;
            }
        }
        return config;
    }

    void open_group(std::uint32_t type, int cpu, const std::vector<Event>& events) {
        Group group;
        std::vector<Channel> channels;
        for (const Event& event : events) {
            perf_event_attr attr{};
            attr.size = sizeof attr;
            attr.type = type;
            attr.config = event.config[0];
            attr.config1 = event.config[1];
            attr.config2 = event.config[2];
            attr.read_format = PERF_FORMAT_GROUP;
            const int leader = group.files.empty() ? -1 : group.files[0].fd();
            File file(static_cast<int>(
                ::syscall(SYS_perf_event_open, &attr, -1, cpu, leader, PERF_FLAG_FD_CLOEXEC)));
            if (!file) {
                note_failure(event.name, cpu, errno);
                continue;
            }
            group.files.push_back(moved_up(std::move(file)));
            channels.push_back(describe(event, cpu));
        }
        if (group.files.empty()) return;
        groups_.push_back(std::move(group));
        channels_.insert(channels_.end(), channels.begin(), channels.end());
    }

    Channel describe(const Event& event, int cpu) const {
        const fs::path topology =
            sysfs_ / "devices/system/cpu" / ("cpu" + std::to_string(cpu)) / "topology";
        Channel channel;
        channel.name = "cpu" + std::to_string(cpu) + "/" + event.name;
        channel.quantity = "energy";
        channel.unit = "J";
        channel.scale = event.scale;
        channel.counter = true;
        channel.source = "perf";
        channel.labels = {{"pmu", pmu_},
                          {"event", event.name},
                          {"cpu", std::to_string(cpu)},
                          {"package", read_text(topology / "physical_package_id")},
                          {"die", read_text(topology / "die_id")}};
        return channel;
    }

    void note_failure(const std::string& event, int cpu, int error) {
        const std::string what = "perf event " + event + " on cpu " + std::to_string(cpu);
        if (!is_denied(error)) {
            notes_.push_back({what, std::string("perf_event_open: ") + std::strerror(error),
                              "check dmesg; the event may not exist on this CPU"});
            return;
        }
        const std::string paranoid = read_text("/proc/sys/kernel/perf_event_paranoid");
        notes_.push_back(denied(
            what, "kernel.perf_event_paranoid is " + paranoid + ", and CAP_PERFMON is missing",
            "sudo sysctl kernel.perf_event_paranoid=0"));
    }

    const std::string pmu_;
    const fs::path sysfs_, directory_;
    std::vector<Group> groups_;
};

}  // namespace

std::unique_ptr<Sensor> open_perf(const std::string& where) {
    return std::make_unique<Perf>("power", where.empty() ? "/sys" : where);
}

std::unique_ptr<Sensor> open_perf_core(const std::string& where) {
    return std::make_unique<Perf>("power_core", where.empty() ? "/sys" : where);
}

}  // namespace pepr
