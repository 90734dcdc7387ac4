#include "chat.h"

#include <nlohmann/json.hpp>


#include "error.h"

namespace pq::runner {

namespace {

std::string stripped(const std::string& text) {
    const char* const spaces = " \t\n\r\f\v";
    const size_t first = text.find_first_not_of(spaces);
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(spaces) - first + 1);
}

}  // namespace

ChatTemplate::Around ChatTemplate::around(const Json& pieces, const char* role) {
    const auto both = pieces.at(role).get<std::vector<std::string>>();
    if (both.size() != 2) throw Error(std::string("'") + role + "' is not a pair", "deploy/chat.json");
    return {both[0], both[1]};
}

ChatTemplate::ChatTemplate(const Json& pieces, const std::string& where) : where_(where) {
    try {
        bos_ = pieces.at("bos").get<std::string>();
        default_system_ = pieces.value("default_system", "");
        generation_ = pieces.at("generation").get<std::string>();
        strip_ = pieces.value("strip", false);
        if (pieces.contains("system") && !pieces.at("system").is_null()) system_ = around(pieces, "system");
        user_ = around(pieces, "user");
        assistant_ = around(pieces, "assistant");
    } catch (const Json::exception& error) {
        throw Error(std::string("the file has not the pieces of a chat template (") + error.what() + ")", where,
                    "Build the bundle again.");
    }
}

std::string ChatTemplate::format(const std::vector<Message>& messages) const {
    std::string text = bos_;
    if (messages.empty() || messages[0].role != "system") text += default_system_;
    for (size_t i = 0; i < messages.size(); ++i) {
        const std::string& role = messages[i].role;
        const Around* piece = role == "user" ? &user_ : role == "assistant" ? &assistant_ : nullptr;
        if (role == "system") {
            if (i) throw Error("the system message is not the first", where_);
            if (!system_) throw Error("the model's chat template has no system message", where_, "Leave --system out.");
            piece = &*system_;
        }
        if (!piece) throw Error("there is no role '" + role + "'", where_);
        text += piece->before + (strip_ ? stripped(messages[i].content) : messages[i].content) + piece->after;
    }
    return text + generation_;
}

}  // namespace pq::runner
