// What every driver is: a Sensor that reads numbers, each described by a Channel.
#pragma once

#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace pepr {

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

// What one recorded number is. A recording must explain itself years later, so a driver puts all it
// knows about the number (zone path, UUID, model) into `labels`. Python interprets it.
struct Channel {
    std::string name;      // unique in its lane and stable across runs, "GPU-1f2e…/energy"
    std::string quantity;  // "energy", "power", "utilisation", "memory", "cpu_time", "count",
                           // "identity"
    std::string unit;      // SI unit of value × scale: "J", "W", "1", "B", "s"
    double scale = 1.0;    // recorded value × scale = value in `unit`; kept apart to stay exact
    double modulus = 0.0;  // a counter wraps to 0 at this recorded value; 0: it does not wrap
    bool counter = false;  // cumulative: only differences mean anything
    std::string source;    // where it was read, "powercap", "nvml-energy"
    std::map<std::string, std::string> labels;
};

// What could not be opened, why, and how to make it work. A sensor that opens has a note for each
// of its parts that did not.
struct Note {
    std::string what, why, fix;
    bool denied = false;  // only a permission is missing
};

inline Note denied(std::string what, const std::string& why, std::string fix) {
    return {std::move(what), "Permission denied: " + why, std::move(fix), true};
}

// Thrown when a sensor cannot be opened at all.
class SensorError : public std::runtime_error {
public:
    explicit SensorError(Note about) : std::runtime_error(about.what), note(std::move(about)) {}
    SensorError(std::string what, std::string why, std::string fix)
        : SensorError(Note{std::move(what), std::move(why), std::move(fix)}) {}

    Note note;
};

// One opened driver. Its constructor may block, allocate and throw SensorError; poll may not.
class Sensor {
public:
    virtual ~Sensor() = default;

    // Writes one number for each channel to `out`, kUnknown where a read failed.
    virtual void poll(double* out) noexcept = 0;

    // Called before the last poll, which then has to read everything, however rarely it is read.
    virtual void finish() noexcept {}

    const std::vector<Channel>& channels() const noexcept { return channels_; }
    const std::vector<Note>& notes() const noexcept { return notes_; }

protected:
    std::vector<Channel> channels_;
    std::vector<Note> notes_;
};

// Opens `kind[:where]`; throws SensorError for an unknown kind or a source that is not there.
std::unique_ptr<Sensor> open_sensor(const std::string& spec);

}  // namespace pepr
