// Energy and power of any chip that the kernel's hwmon class shows: AMD GPUs and CPUs, Grace,
// power supplies, board monitors.

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "../file.h"
#include "../sensor.h"

namespace pepr {

namespace {

namespace fs = std::filesystem;

class Hwmon final : public Sensor {
public:
    explicit Hwmon(const fs::path& root) {
        std::set<fs::path> chips;
        std::error_code error;
        for (const auto& entry : fs::directory_iterator(root, error)) chips.insert(entry.path());
        if (error)
            throw SensorError(
                "no hwmon at " + root.string(), error.message(),
                "virtual machines and containers may not have it; on the host see: sensors");
        for (const fs::path& chip : chips) open_chip(chip);
        if (channels_.empty() && !notes_.empty())
            throw SensorError("hwmon sensors cannot be read", notes_[0].why, notes_[0].fix);
        if (channels_.empty())
            throw SensorError(
                "no energy or power in hwmon",
                "none of " + std::to_string(chips.size()) + " chips has energy*_input or power*",
                "load the chip's driver (amdgpu, amd_energy, ina3221 …) if the board has one");
    }

    void poll(double* out) noexcept override {
        for (std::size_t i = 0; i < files_.size(); ++i) {
            char text[32];
            const char* at = text;
            const char* const end = text + files_[i].read(text, sizeof text);
            std::uint64_t value = 0;
            out[i] = parse_number(at, end, value) ? static_cast<double>(value) : kUnknown;
        }
    }

private:
    void open_chip(const fs::path& chip) {
        std::set<fs::path> files;
        std::error_code error;
        for (const auto& entry : fs::directory_iterator(chip, error)) files.insert(entry.path());
        for (const fs::path& file : files) {
            const std::string name = file.filename();
            const auto underscore = name.find('_');
            const std::string base = name.substr(0, underscore);  // "power1"
            const std::string what = underscore == std::string::npos ? "" : name.substr(underscore);
            if (base.rfind("energy", 0) == 0 && what == "_input") open_file(chip, file, base, true);
            // The average covers the time between two reads, the input an instant of it.
            const bool average = what == "_average";
            const bool input = what == "_input" && files.count(chip / (base + "_average")) == 0;
            if (base.rfind("power", 0) == 0 && (average || input))
                open_file(chip, file, base, false);
        }
    }

    void open_file(const fs::path& chip, const fs::path& path, const std::string& base,
                   bool energy) {
        const std::string name = read_text(chip / "name");
        const std::string label = read_text(chip / (base + "_label"));
        File file(path);
        if (!file) {
            notes_.push_back({"hwmon " + name + " " + base, std::strerror(errno),
                              "sudo chmod o+r " + path.string() + ", or run as root"});
            return;
        }
        std::error_code error;
        const fs::path device = fs::canonical(chip / "device", error);
        // hwmonN is numbered anew at every boot; the device's own name stays.
        const std::string owner = error ? chip.filename().string() : device.filename().string();
        Channel channel;
        channel.name = name + "@" + owner + "/" + base;
        channel.quantity = energy ? "energy" : "power";
        channel.unit = energy ? "J" : "W";
        channel.scale = 1e-6;
        channel.counter = energy;
        channel.source = energy ? "hwmon-energy" : "hwmon-power";
        channel.labels = {{"chip", name},
                          {"device", owner},
                          {"input", base},
                          {"label", label},
                          {"model", read_text(chip / "device/product_name")}};
        channels_.push_back(std::move(channel));
        files_.push_back(std::move(file));
    }

    std::vector<File> files_;
};

}  // namespace

std::unique_ptr<Sensor> open_hwmon(const std::string& where) {
    return std::make_unique<Hwmon>(where.empty() ? "/sys/class/hwmon" : where);
}

}  // namespace pepr
