// Conversations as the model wants them. deploy/chat.json holds the literal pieces of the chat template, cut out by
// rendering it at export; there is no Jinja here.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "files.h"

namespace pq::runner {

struct Message {
    std::string role;  // "system", "user" or "assistant"
    std::string content;
};

class ChatTemplate {
public:
    // {"bos": "", "system": [before, after] or null, "default_system": "" (in place of a missing system message),
    //  "user": [before, after], "assistant": [before, after], "generation": "", "strip": false}
    // `where` is for messages.
    ChatTemplate(const Json& pieces, const std::string& where);

    // The text of a conversation, ready for the answer. Error: a role that the template does not have, a system
    // message that is not the first.
    std::string format(const std::vector<Message>& messages) const;

private:
    struct Around {
        std::string before, after;
    };
    static Around around(const Json& pieces, const char* role);

    std::string where_, bos_, default_system_, generation_;
    std::optional<Around> system_;
    Around user_, assistant_;
    bool strip_ = false;
};

}  // namespace pq::runner
