// Text between Python and the core: paths are the system's bytes, whatever the locale says they
// are.
#pragma once

#include <string>

#include <pybind11/pybind11.h>

namespace pepr {

// The bytes of a path or spec. In an ASCII locale Python can hold letters that it cannot encode for
// the system, because they came from a program's text; file names are UTF-8 then.
inline std::string system_bytes(const pybind11::str& text) {
    PyObject* bytes = PyUnicode_EncodeFSDefault(text.ptr());
    if (bytes == nullptr) {
        PyErr_Clear();
        bytes = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape");
    }
    if (bytes == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::bytes>(bytes);
}

// What a driver says, which may come from sysfs or firmware: bytes that are no UTF-8 are escapes.
inline pybind11::str readable(const std::string& text) {
    PyObject* const decoded =
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace");
    if (decoded == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::str>(decoded);
}

}  // namespace pepr
