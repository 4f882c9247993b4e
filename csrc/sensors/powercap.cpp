// Energy counters of /sys/class/powercap (RAPL and anything else that registers there).

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "../file.h"
#include "../sensor.h"

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
        find_zones(root);
        if (channels_.empty() && !notes_.empty())
            throw SensorError("RAPL counters under " + root.string() + " cannot be read",
                              notes_[0].why, notes_[0].fix);
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
    // The class directory lists children flat beside their parents and again inside them, through
    // symbolic links that also lead back up: zones are told apart by their resolved path.
    void find_zones(const fs::path& root) {
        std::set<fs::path> directories;
        collect(root, 0, directories);
        for (const fs::path& directory : directories) open_zone(directory);
    }

    static void collect(const fs::path& directory, int depth, std::set<fs::path>& found) {
        constexpr int kDeepest = 4;  // control type, package, domain, and one to spare
        std::error_code error;
        for (const auto& entry : fs::directory_iterator(directory, error)) {
            const std::string name = entry.path().filename();
            // Zones are called TYPE:N…; "device", "subsystem" and "power" lead elsewhere.
            if (!entry.is_directory(error) || (depth > 0 && name.find(':') == std::string::npos))
                continue;
            const fs::path real = fs::canonical(entry.path(), error);
            if (error) continue;
            if (fs::exists(real / "energy_uj", error) && !found.insert(real).second) continue;
            if (depth < kDeepest) collect(real, depth + 1, found);
        }
    }

    void open_zone(const fs::path& directory) {
        const std::string zone = directory.filename();
        const std::string name = read_text(directory / "name");
        File file(directory / "energy_uj");
        if (!file) {
            const int error = errno;
            const bool denied = error == EACCES || error == EPERM;
            notes_.push_back({"powercap zone " + zone + (name.empty() ? "" : " (" + name + ")"),
                              std::string("energy_uj cannot be read: ") + std::strerror(error),
                              denied ? "sudo chmod o+r " + (directory / "energy_uj").string() +
                                           " (root only since CVE-2020-8694), or run as root"
                                     : "check " + directory.string()});
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
        // One unit (61 µJ) short of the true modulus, which sysfs does not tell: negligible a wrap.
        const std::string range = read_text(directory / "max_energy_range_uj");
        if (!range.empty()) channel.modulus = std::strtod(range.c_str(), nullptr);
        channels_.push_back(std::move(channel));
        files_.push_back(std::move(file));
    }

    std::vector<File> files_;
};

}  // namespace

std::unique_ptr<Sensor> open_powercap(const std::string& where) {
    return std::make_unique<Powercap>(where.empty() ? "/sys/class/powercap" : where);
}

}  // namespace pepr
