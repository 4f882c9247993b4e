// Energy counters of /sys/class/powercap: RAPL, and whatever else registers there.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include "sensors/sensor.h"
#include "system/file.h"
#include "system/lasting_file.h"
#include "system/numbers.h"

namespace pepr {

namespace {

namespace fs = std::filesystem;

class Powercap final : public Sensor {
public:
    explicit Powercap(const fs::path& root) {
        std::error_code error;
        if (!fs::is_directory(root, error))
            throw SensorError(
                "no powercap at " + root.string(),
                "the kernel offers no RAPL zones here (a virtual machine, a container that masks "
                "/sys/class/powercap, or the intel_rapl_msr module is not loaded)",
                "on the host: sudo modprobe intel_rapl_msr; in a container: mount the "
                "host's /sys/class/powercap and pass --sensor powercap:PATH");
        std::set<fs::path> zones;
        collect(root, 0, zones);
        for (const fs::path& zone : zones) open_zone(zone);
        if (channels_.empty() && !notes_.empty()) {
            Note note = notes_[0];
            note.what = "RAPL counters under " + root.string() + " cannot be read";
            if (note.fix.find("/energy_uj") != std::string::npos)
                note.fix = "sudo chmod o+r " + root.string() + "/*/energy_uj";
            throw SensorError(std::move(note));
        }
        if (channels_.empty())
            throw SensorError("no energy counter under " + root.string(),
                              "no zone has a file energy_uj",
                              "load the driver (sudo modprobe intel_rapl_msr) or drop this sensor");
    }

    void poll(double* out) noexcept override {
        for (std::size_t i = 0; i < files_.size(); ++i) {
            char text[32];
            const char* at = text;
            const char* const end = text + files_[i].read(text, sizeof text);
            std::uint64_t energy_uj = 0;
            out[i] = parse_number(at, end, energy_uj) ? static_cast<double>(energy_uj) : kUnknown;
        }
    }

private:
    // The class directory lists child zones beside their parents and again inside them, through
    // symbolic links that also lead back up. The resolved path identifies a zone.
    void collect(const fs::path& directory, int depth, std::set<fs::path>& found) {
        constexpr int kMostDepth = 4;  // control type, package, domain, and one to spare
        std::error_code error;
        const auto entries = list_directory(directory, error);
        if (is_denied(error.value())) note_denied("powercap " + directory.string(), directory);
        for (const fs::path& entry : entries) {
            // Zones have names like TYPE:N; "device", "subsystem" and "power" lead elsewhere.
            if (depth > 0 && entry.filename().string().find(':') == std::string::npos) continue;
            if (!fs::is_directory(entry, error)) continue;
            const fs::path real = fs::canonical(entry, error);
            if (error) continue;
            if (fs::exists(real / "energy_uj", error) && !found.insert(real).second) continue;
            if (depth < kMostDepth) collect(real, depth + 1, found);
        }
    }

    void note_denied(const std::string& what, const fs::path& path) {
        std::error_code error;
        const char* const bits = fs::is_directory(path, error) ? "o+rx " : "o+r ";
        notes_.push_back(denied(what,
                                path.filename().string() + " is for root only, since CVE-2020-8694",
                                std::string("sudo chmod ") + bits + path.string()));
    }

    void open_zone(const fs::path& directory) {
        const std::string zone = directory.filename();
        const std::string name = read_text(directory / "name");
        const std::string what = "powercap zone " + zone + (name.empty() ? "" : " (" + name + ")");
        LastingFile file(directory / "energy_uj");
        if (!file) {
            const int error = errno;
            if (is_denied(error)) return note_denied(what, directory / "energy_uj");
            notes_.push_back({what,
                              std::string("energy_uj cannot be read: ") + std::strerror(error),
                              "check " + directory.string()});
            return;
        }
        Channel channel;
        channel.name = zone;
        channel.quantity = "energy";
        channel.unit = "J";
        channel.scale = 1e-6;
        channel.counter = true;
        channel.source = "powercap";
        channel.labels = {{"zone", zone}, {"name", name}};
        const std::string parent = directory.parent_path().filename();
        if (parent.find(':') != std::string::npos) {
            channel.labels["parent"] = parent;
            channel.labels["parent_name"] = read_text(directory.parent_path() / "name");
        }
        if (const double limit_w = most_power_w(directory); limit_w > 0)
            channel.labels["limit_w"] = std::to_string(std::llround(limit_w));
        // One unit (61 µJ) less than the true modulus, which sysfs does not show. Once per wrap,
        // that is negligible.
        const std::string range = read_text(directory / "max_energy_range_uj");
        if (!range.empty()) channel.modulus = to_double(range.c_str());
        if (!(channel.modulus > 0 && std::isfinite(channel.modulus))) {
            channel.modulus = 0;
            notes_.push_back(
                {"the range of " + what,
                 "it has no max_energy_range_uj, so that a wrap looks like a reset and "
                 "loses what was counted since the reading before",
                 "none: the driver does not give it; keep --period short"});
        }
        channels_.push_back(std::move(channel));
        files_.push_back(std::move(file));
    }

    // The largest of a zone's constraint_N_max_power_uw, W; 0 if it states none.
    static double most_power_w(const fs::path& zone) {
        double most_w = 0.0;
        for (int n = 0;; ++n) {
            const std::string constraint = "constraint_" + std::to_string(n);
            const std::string text = read_text(zone / (constraint + "_max_power_uw"));
            if (!text.empty()) most_w = std::max(most_w, 1e-6 * to_double(text.c_str()));
            std::error_code error;
            if (text.empty() && !fs::exists(zone / (constraint + "_name"), error)) return most_w;
        }
    }

    std::vector<LastingFile> files_;
};

}  // namespace

std::unique_ptr<Sensor> open_powercap(const std::string& where) {
    return std::make_unique<Powercap>(where.empty() ? "/sys/class/powercap" : where);
}

}  // namespace pepr
