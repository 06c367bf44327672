#pragma once

// `echo` of /v1/completions: the prompt before its continuation, and with `logprobs` the log-probability of every token of
// both, under the request's loop; what lm-eval's local-completions asks for. Included by tools/server where
// llama-server-loop.patch is applied; json and is_valid_utf8 are server-common.h's.

#include "common.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

struct server_echo {
    struct token {
        llama_token id;
        double      logprob; // of no meaning for the first, which nothing precedes

        std::vector<std::pair<llama_token, double>> top; // the likeliest, and the token itself
    };

    std::vector<token> tokens;

    void start(llama_token id) {
        tokens.assign(1, { id, 0.0, {} });
    }

    // the token that followed, and the logits [n_vocab] that it was one of
    void add(llama_token id, const float * logits, int32_t n_vocab, size_t n_top) {
        const float  max = *std::max_element(logits, logits + n_vocab);
        double       sum = 0.0;
        for (int32_t i = 0; i < n_vocab; ++i) {
            sum += std::exp((double) logits[i] - max);
        }
        const double log_sum = max + std::log(sum);

        std::vector<llama_token> ids(n_vocab);
        for (int32_t i = 0; i < n_vocab; ++i) {
            ids[i] = i;
        }
        n_top = std::min<size_t>(n_top, n_vocab);
        std::partial_sort(ids.begin(), ids.begin() + n_top, ids.end(), [&](llama_token a, llama_token b) {
            return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
        });
        ids.resize(n_top);
        if (std::find(ids.begin(), ids.end(), id) == ids.end()) {
            ids.push_back(id);
        }

        token res = { id, logits[id] - log_sum, {} };
        for (const auto other : ids) {
            res.top.emplace_back(other, logits[other] - log_sum);
        }
        tokens.push_back(std::move(res));
    }

    // The shape of OpenAI's /v1/completions. Offsets count characters of `text`, which may lack what the tokenizer put before
    // it; "": all pieces of the n_prompt tokens of the prompt.
    template <typename J>
    J to_json(const llama_context * ctx, size_t n_prompt, const std::string & text) const {
        J res = {
            {"tokens", J::array()}, {"token_logprobs", J::array()}, {"top_logprobs", J::array()}, {"text_offset", J::array()},
        };
        const auto width = [](const std::string & piece) {
            return std::count_if(piece.begin(), piece.end(), [](char c) { return (c & 0xc0) != 0x80; });
        };
        int64_t offset = 0;
        if (!text.empty()) {
            offset = width(text);
            for (size_t i = 0; i < std::min(n_prompt, tokens.size()); ++i) {
                offset -= width(common_token_to_piece(ctx, tokens[i].id, true));
            }
        }
        for (size_t i = 0; i < tokens.size(); ++i) {
            const auto & tok = tokens[i];
            res["tokens"].push_back(shown(ctx, tok.id));
            res["text_offset"].push_back(std::max<int64_t>(offset, 0));
            offset += width(common_token_to_piece(ctx, tok.id, true));
            if (i == 0) {
                res["token_logprobs"].push_back(nullptr);
                res["top_logprobs"].push_back(nullptr);
                continue;
            }
            J top = J::object();
            for (const auto & [id, logprob] : tok.top) {
                std::string name = shown(ctx, id);
                if (top.contains(name)) { // two tokens, one text
                    name = "token_id:" + std::to_string(id);
                }
                top[name] = logprob;
            }
            res["token_logprobs"].push_back(tok.logprob);
            res["top_logprobs"].push_back(top);
        }
        return res;
    }

private:
    // a token's text, or its bytes where they are no text
    static std::string shown(const llama_context * ctx, llama_token id) {
        const std::string piece = common_token_to_piece(ctx, id, true);
        if (is_valid_utf8(piece)) {
            return piece;
        }
        std::string res = "bytes:";
        for (const unsigned char c : piece) {
            char text[8];
            snprintf(text, sizeof(text), "\\x%02x", c);
            res += text;
        }
        return res;
    }
};
