#pragma once

// A loop per request of llama-server: what a request says, and what the server has to know of it. Included by tools/server
// where llama-server-loop.patch is applied; json is server-common.h's.

#include "llama-loop.h"

#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

struct server_loop {
    std::string text; // as it was given, with one space between words; "" for the plain model

    std::shared_ptr<const llama_loop_spec> spec; // null for the plain model

    // throws std::invalid_argument, with what is wrong and what to do
    static server_loop parse(const std::string & text) {
        std::istringstream stream(text);
        server_loop        res;
        for (std::string word; stream >> word; ) {
            res.text += (res.text.empty() ? "" : " ") + word;
        }
        if (res.text.empty() || res.text == "off" || res.text == "plain") {
            return {};
        }

        auto spec = std::make_shared<llama_loop_spec>();
        if (llama_loop_parse(res.text.c_str(), 0, spec.get()) != LLAMA_LOOP_OK) {
            refuse();
        }
        if (spec->decode_entropy >= 0.0) {
            throw std::invalid_argument("decode entropy evaluates a token twice, which the server does not; "
                                        "use another decode, or `ggufloop run`.");
        }
        if (spec->params.n_eval == 1) { // the model as it is
            return {};
        }
        res.spec = std::move(spec);

        return res;
    }

    [[noreturn]] static void refuse() {
        std::string words = llama_loop_error();
        const size_t at = words.find('\n');
        if (at != std::string::npos) {
            words[at] = ' ';
        }
        throw std::invalid_argument(words);
    }

    // the loop as a model's name has it: @12:16x3,kv=each
    std::string suffix() const {
        if (!spec) {
            return "@off";
        }
        std::istringstream stream(text);
        std::string res = "@";
        std::string k;
        std::string rest;
        for (std::string word; stream >> word; ) {
            if (res == "@") {
                res += word;
            } else if (word.compare(0, 2, "k=") == 0 || word.compare(0, 2, "K=") == 0) {
                k = word.substr(2);
            } else {
                rest += "," + word;
            }
        }
        return res + "x" + k + rest;
    }

    bool is_loop() const { return spec != nullptr; }
    bool is_each() const { return spec && spec->params.kv == LLAMA_LOOP_KV_EACH; }
    bool halts()   const { return spec && spec->params.halt > 0.0; }

    // whether what a prompt computes depends on how it is cut into ubatches
    bool depends_on_cuts() const {
        return halts() || (spec && (spec->params.kv == LLAMA_LOOP_KV_FIRST || spec->params.kv == LLAMA_LOOP_KV_LAST));
    }

    // whether the K/V slots that one needs serve the other: those of kv each are the window's, one per evaluation
    bool same_slots(const server_loop & other) const {
        if (!is_each() || !other.is_each()) {
            return is_each() == other.is_each();
        }
        const auto & a = spec->params;
        const auto & b = other.spec->params;
        return a.first == b.first && a.last == b.last && a.n_eval == b.n_eval;
    }

    // whether the n-th generated token after a prompt loops; n = 0: the prompt
    bool loops(int32_t n) const {
        return spec && (n == 0 || spec->decode_first < 0 || n <= spec->decode_first);
    }

    llama_loop_params params() const {
        return llama_loop_spec_params(spec.get());
    }
};

// `loop`: null, a text, or an object of its settings; else the model's suffix, as in model@12:16x3 or model@12:16x3,kv=each;
// else the server's own.
template <typename J>
inline server_loop server_loop_of_request(const J & body, const std::string & base) {
    if (body.contains("loop")) {
        const J & loop = body.at("loop");
        if (loop.is_null()) {
            return {};
        }
        if (loop.is_string()) {
            return server_loop::parse(loop.template get<std::string>());
        }
        if (!loop.is_object() || !loop.contains("window")) {
            throw std::invalid_argument("loop is neither null, nor text, nor an object with a window; "
                                        "write it like \"14:20 k=3\" or {\"window\": \"14:20\", \"k\": 3}.");
        }
        const auto shown = [](const J & value) {
            if (value.is_string()) {
                const auto word = value.template get<std::string>();
                if (word.empty() || word.find(' ') != std::string::npos) {
                    throw std::invalid_argument("a setting of loop is one word, not '" + word + "'.");
                }
                return word;
            }
            if (value.is_array() && value.size() == 2) {
                return value[0].dump() + ":" + value[1].dump();
            }
            return value.dump();
        };
        std::string text = shown(loop.at("window"));
        for (const auto & [name, value] : loop.items()) {
            if (name != "window" && !value.is_null()) {
                text += " " + name + "=" + shown(value);
            }
        }
        return server_loop::parse(text);
    }

    if (body.contains("model") && body.at("model").is_string()) {
        const auto model = body.at("model").template get<std::string>();
        const auto at    = model.rfind('@');
        std::string text = at == std::string::npos ? "" : model.substr(at + 1);

        // some names have an @ of their own: name@20241022, name@home
        const bool is_loop = text == "off" || text == "plain" || text.find(':') != std::string::npos;
        if (is_loop) {
            const size_t x = text.find('x');
            if (x != std::string::npos && x < text.find_first_of(",/")) {
                text.replace(x, 1, " k=");
            }
            for (auto & c : text) { // lm-eval cuts its arguments at commas
                c = c == ',' || c == '/' ? ' ' : c;
            }
            return server_loop::parse(text);
        }
    }

    return server_loop::parse(base);
}
