// Energy and power of every chip in the kernel's hwmon class: AMD's and Intel's GPUs, AMD's CPUs,
// Grace, power supplies, board monitors.

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "sensors/sensor.h"
#include "system/file.h"
#include "system/lasting_file.h"
#include "system/numbers.h"

namespace pepr {

namespace {

namespace fs = std::filesystem;

// The directory in which the kernel lists classes of devices, "/sys/class", of a chip in it.
fs::path class_of(const fs::path& chip) { return chip.parent_path().parent_path(); }

// The PCI addresses of AMD's GPUs in the order in which ROCm counts them: that of KFD's nodes. A
// GPU that is divided (MI300) has several nodes. Nodes of processors have no SIMD.
std::vector<std::string> rocm_order(const fs::path& classes) {
    std::error_code error;
    std::map<int, std::string> by_node;
    for (const fs::path& node : list_directory(classes / "kfd/kfd/topology/nodes", error)) {
        std::map<std::string, std::uint64_t> facts;
        std::ifstream file(node / "properties");
        for (std::string name, value; file >> name >> value;)
            facts[name] = std::strtoull(value.c_str(), nullptr, 10);
        if (facts["simd_count"] == 0) continue;
        const auto location = static_cast<unsigned>(facts["location_id"]);
        char address[32];
        std::snprintf(address, sizeof address, "%04x:%02x:%02x.%x",
                      static_cast<unsigned>(facts["domain"]) & 0xffffU, location >> 8 & 0xffU,
                      location >> 3 & 0x1fU, location & 7U);
        by_node[std::atoi(node.filename().c_str())] = address;
    }
    std::vector<std::string> order;
    for (const auto& [node, address] : by_node) order.push_back(address);
    return order;
}

// The PCI addresses of Intel's GPUs, integrated ones too, in the order of the bus.
std::vector<std::string> intel_order(const fs::path& classes) {
    std::error_code error;
    std::set<std::string> order;
    for (const fs::path& card : list_directory(classes / "drm", error)) {
        const std::string name = card.filename();
        if (name.rfind("card", 0) != 0 || name.find('-') != std::string::npos) continue;
        if (read_text(card / "device/vendor") != "0x8086") continue;
        const fs::path device = fs::canonical(card / "device", error);
        if (!error) order.insert(device.filename());
    }
    return {order.begin(), order.end()};
}

// How many tiles an Intel GPU has, each of which may be a device of its own.
std::size_t tiles_of(const fs::path& device) {
    std::error_code error;
    std::size_t tiles = 0;
    for (const fs::path& entry : list_directory(device, error))
        tiles += entry.filename().string().rfind("tile", 0) == 0;
    if (tiles > 0) return tiles;  // xe; i915 lists them below its card
    for (const fs::path& card : list_directory(device / "drm", error))
        for (const fs::path& entry : list_directory(card / "gt", error))
            tiles += entry.filename().string().rfind("gt", 0) == 0;
    return tiles;
}

class Hwmon final : public Sensor {
public:
    explicit Hwmon(const fs::path& root) {
        std::error_code error;
        std::set<fs::path> chips = list_directory(root, error);
        const std::string missing = "no hwmon at " + root.string();
        if (is_denied(error.value()))
            throw SensorError(denied(missing, root.string(), "sudo chmod o+rx " + root.string()));
        if (error)
            throw SensorError(missing, error.message(),
                              "virtual machines have none; on the machine itself: sensors");
        if (chips.count(root / "name") > 0) chips = {root};  // the spec names a single chip
        for (const fs::path& chip : chips) open_chip(chip);
        if (channels_.empty() && !notes_.empty()) {
            notes_[0].what = "hwmon sensors cannot be read";
            throw SensorError(notes_[0]);
        }
        if (channels_.empty())
            throw SensorError(
                "no energy or power in hwmon",
                "none of " + std::to_string(chips.size()) + " chips has energy*_input or power*",
                "load the chip's driver (amdgpu, amd_energy, ina3221 …) if the board has one");
    }

    void poll(double* out) noexcept override {
        for (Reading& reading : readings_) {
            double value = number(reading.file);
            if (reading.factor) value *= number(reading.factor);
            *out++ = value;
        }
    }

private:
    struct Reading {
        LastingFile file;
        LastingFile factor;  // current, where a chip has voltage and current but no power
    };

    static double number(LastingFile& file) noexcept {
        char text[32];
        const char* at = text;
        const char* const end = text + file.read(text, sizeof text);
        std::uint64_t value = 0;
        return parse_number(at, end, value) ? static_cast<double>(value) : kUnknown;
    }

    void open_chip(const fs::path& chip) {
        std::error_code error;
        std::set<fs::path> files = list_directory(chip, error);
        // Old drivers (acpi_power_meter on Grace) put their files into the device's directory.
        for (const fs::path& file : list_directory(chip / "device", error))
            if (files.count(chip / file.filename()) == 0) files.insert(file);
        const auto has = [&](const fs::path& file) { return files.count(file) > 0; };
        std::string name = read_text(chip / "name");
        if (name.empty()) name = read_text(chip / "device/name");
        // Where the GPU is a part of the processor, the power is the whole processor's. amdgpu then
        // has no power cap (amdgpu_pm.c), except for one chip, which has this label.
        const bool processor = name == "amdgpu" && (!has(chip / "power1_cap") ||
                                                    read_text(chip / "power1_label") == "slowPPT");
        for (const fs::path& file : files) {
            const std::string stem = file.filename();
            const auto underscore = stem.find('_');
            if (underscore == std::string::npos) continue;
            const std::string base = stem.substr(0, underscore);  // "power1"
            const std::string what = stem.substr(underscore);
            const fs::path path = file.parent_path() / base;
            // power*_average covers all of the time between two readings, power*_input an instant.
            const bool power =
                base.rfind("power", 0) == 0 &&
                (what == "_average" || (what == "_input" && !has(path.string() + "_average")));
            const bool energy = base.rfind("energy", 0) == 0 && what == "_input";
            // Jetson's ina3221 has the voltage and current of a rail: mV times mA is microwatts.
            const fs::path current = file.parent_path() / ("curr" + base.substr(2) + "_input");
            const bool rail = name == "ina3221" && base.rfind("in", 0) == 0 && what == "_input" &&
                              has(current) && has(path.string() + "_label");
            if (power || energy || rail)
                open_file(chip, name, path, file, rail ? current : "", energy, processor);
        }
    }

    void open_file(const fs::path& chip, const std::string& name, const fs::path& base,
                   const fs::path& path, const fs::path& factor, bool energy, bool processor) {
        const std::string input = base.filename();
        Reading reading{LastingFile(path), factor.empty() ? LastingFile() : LastingFile(factor)};
        if (!reading.file || (!factor.empty() && !reading.factor)) {
            const int error = errno;
            const std::string what = "hwmon " + name + " " + input;
            notes_.push_back(is_denied(error)
                                 ? denied(what, path.filename().string() + " is for root only",
                                          "sudo chmod o+r " + path.string())
                                 : Note{what, std::strerror(error), "check " + path.string()});
            return;
        }
        std::string label = read_text(base.string() + "_label");
        if (label.empty()) label = read_text(base.string() + "_oem_info");
        std::error_code error;
        const fs::path device = fs::canonical(chip / "device", error);
        // The N of hwmonN may change with every boot; the device's own name does not.
        const std::string owner = error ? chip.filename().string() : device.filename().string();
        Channel channel;
        channel.name = name + "@" + owner + "/" + input;
        channel.quantity = energy ? "energy" : "power";
        channel.unit = energy ? "J" : "W";
        channel.scale = 1e-6;
        channel.counter = energy;
        channel.source = energy ? "hwmon-energy" : "hwmon-power";
        channel.labels = {{"chip", name},
                          {"device", owner},
                          {"input", input},
                          {"label", label},
                          {"model", read_text(chip / "device/product_name")}};
        // Of a chip's energy counter, the limit is that of its power.
        const fs::path limited = path.parent_path() / (energy ? "power1" : input);
        for (const char* limit : {"_cap_max", "_crit", "_rated_max"}) {
            const std::string text = read_text(limited.string() + limit);
            const double limit_w = text.empty() ? 0 : 1e-6 * to_double(text.c_str());
            if (limit_w < 1) continue;
            channel.labels["limit_w"] = std::to_string(std::llround(limit_w));
            break;
        }
        if (processor) channel.labels["part_of"] = "processor";
        if (name == "amdgpu") {
            describe_order(channel, rocm_order(class_of(chip)));
            const std::string unique = read_text(chip / "device/unique_id");
            if (!unique.empty()) channel.labels["unique_id"] = unique;
        } else if (name == "xe" || name.rfind("i915", 0) == 0) {
            describe_order(channel, intel_order(class_of(chip)));
            const std::size_t tiles = tiles_of(device);
            if (tiles > 1) channel.labels["tiles"] = std::to_string(tiles);
        }
        channels_.push_back(std::move(channel));
        readings_.push_back(std::move(reading));
    }

    // Where a GPU stands when programs count them, which variables such as HIP_VISIBLE_DEVICES do.
    static void describe_order(Channel& channel, const std::vector<std::string>& order) {
        std::string indices;
        for (std::size_t i = 0; i < order.size(); ++i)
            if (order[i] == channel.labels["device"])
                indices += (indices.empty() ? "" : ",") + std::to_string(i);
        if (order.empty()) return;
        channel.labels["indices"] = indices;
        channel.labels["gpus"] = std::to_string(order.size());
    }

    std::vector<Reading> readings_;
};

}  // namespace

std::unique_ptr<Sensor> open_hwmon(const std::string& where) {
    return std::make_unique<Hwmon>(where.empty() ? "/sys/class/hwmon" : where);
}

}  // namespace pepr
