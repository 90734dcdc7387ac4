// Messages of the plugins in TensorRT's log.
#include <cxxabi.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <typeinfo>

#include "plugin.h"

namespace pq::trt {

// In TensorRT 10 loggers and their finder are plain interfaces; in 11 and in TensorRT for RTX 1.7 they are versioned
// ones, and their functions lie elsewhere in the virtual table. The rest of what a plugin meets is the same in both.
// One libpq.so works in either, whichever headers it was built with, because both forms are declared here; and not in
// the anonymous namespace, where the compiler would conclude that nobody implements them.
struct PlainLogger {
    virtual void log(int32_t severity, const char* line) noexcept = 0;
};
struct PlainLoggerFinder {
    virtual PlainLogger* findLogger() = 0;
};
struct VersionedLogger : nvinfer1::IVersionedInterface {
    virtual void log(int32_t severity, const char* line) noexcept = 0;
};
struct VersionedLoggerFinder : nvinfer1::IVersionedInterface {
    virtual VersionedLogger* findLogger() = 0;
};

namespace {

void* logger_finder = nullptr;
bool versioned = false;

// Which form it is, says its type: classes of single inheritance that end at IVersionedInterface, or do not. Without
// type information the answer is no, and the plain call on a versioned finder returns 0, its getAPILanguage().
bool is_versioned(const void* object) {
    const std::type_info* type = (*static_cast<const std::type_info* const* const*>(object))[-1];
    while (type) {
        if (strcmp(type->name(), typeid(nvinfer1::IVersionedInterface).name()) == 0) return true;
        const auto* const derived = dynamic_cast<const abi::__si_class_type_info*>(type);
        type = derived ? derived->__base_type : nullptr;
    }
    return false;
}

enum Severity { kError = 1, kWarning = 2 };  // of nvinfer1::ILogger

void log(Severity severity, Where where, const char* format, va_list arguments) {
    if (!logger_finder) return;
    char line[640];
    const bool named = where.layer && where.layer[0];
    const int used = snprintf(line, sizeof(line), "pq::%s%s%.*s: ", where.op, named ? " " : "",
                              static_cast<int>(kNameLength), named ? where.layer : "");
    vsnprintf(line + used, sizeof(line) - used, format, arguments);
    const auto write = [&](auto* logger) {
        if (logger) logger->log(severity, line);
    };
    if (versioned)
        write(static_cast<VersionedLoggerFinder*>(logger_finder)->findLogger());
    else
        write(static_cast<PlainLoggerFinder*>(logger_finder)->findLogger());
}

}  // namespace

void set_logger_finder(void* finder) {
    logger_finder = finder;
    versioned = finder && is_versioned(finder);
}

int32_t fail(Where where, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    log(kError, where, format, arguments);
    va_end(arguments);
    return 1;
}

void warn(Where where, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    log(kWarning, where, format, arguments);
    va_end(arguments);
}

int32_t report(Where where, const char* function, int status) {
    return status == PQ_OK ? 0 : fail(where, "%s: %s", function, pq_status_string(status));
}

}  // namespace pq::trt
