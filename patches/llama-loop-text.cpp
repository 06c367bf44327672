// A loop as text: `12:16 k=3 solver=euler beta=0.5 kv=frozen decode=bypass`. ggufloop/loop.py reads the same text by the
// same rules and has the same words for what is wrong with it; a test compares the two over thousands of texts.

#include "llama-loop-impl.h"
#include "llama-loop-solver.h"

#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <locale>
#include <sstream>

namespace {

using words_t = std::vector<std::string>;

// what is wrong with a text: the sentence, and what to do
struct text_error {
    std::string what;
    std::string remedy;
};

constexpr size_t  MAX_TEXT  = 512;
constexpr int64_t MAX_EVALS = LLAMA_LOOP_MAX_EVALS;
constexpr int64_t MAX_POS   = INT32_MAX;

const words_t SETTINGS = { "k", "mode", "solver", "damping", "beta", "mu", "passes", "kv", "decode", "routing", "attention",
                           "sinks", "halt" };
const words_t MODES    = { "block", "layer" };
const words_t POLICIES = { "first", "last", "each", "frozen" };
const words_t ROUTINGS = { "free", "frozen" };
const words_t DECODES  = { "full", "bypass", "first:n (n >= 1)", "entropy:t (t >= 0)" };

//
// words
//

// characters of a and b in matching blocks: the longest one, and those on either side of it (Ratcliff and Obershelp)
size_t n_matching(const std::string & a, const std::string & b) {
    size_t best = 0;
    size_t ia   = 0;
    size_t ib   = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        for (size_t j = 0; j < b.size(); ++j) {
            size_t n = 0;
            while (i + n < a.size() && j + n < b.size() && a[i + n] == b[j + n]) {
                ++n;
            }
            if (n > best) {
                best = n;
                ia   = i;
                ib   = j;
            }
        }
    }

    return best == 0 ? 0 : best + n_matching(a.substr(0, ia), b.substr(0, ib)) + n_matching(a.substr(ia + best), b.substr(ib + best));
}

// the closest of the known words, then all of them
std::string nearest(const std::string & word, const words_t & known) {
    std::string all;
    std::string close;
    double      best = 0.6; // less is not close
    for (const auto & k : known) {
        all += (all.empty() ? "" : ", ") + k;

        const double ratio = 2.0*n_matching(k, word)/(k.size() + word.size());
        if (ratio > best || (ratio == best && k > close)) {
            best  = ratio;
            close = k;
        }
    }

    return close.empty() ? "known: " + all + "." : "did you mean " + close + "? Known: " + all + ".";
}

std::string quoted(const std::string & word) {
    return "'" + word + "'";
}

std::string g(double value) {
    return format("%g", value);
}

size_t known(const std::string & name, const std::string & value, const words_t & values) {
    const auto it = std::find(values.begin(), values.end(), value);
    if (it == values.end()) {
        throw text_error { name + " " + quoted(value) + " is not known.", nearest(value, values) };
    }

    return it - values.begin();
}

//
// numbers
//

bool is_digits(const std::string & text, size_t from, size_t most) {
    return text.size() > from && text.size() - from <= most &&
        std::all_of(text.begin() + from, text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

bool is_signed(const std::string & text) {
    return !text.empty() && (text[0] == '+' || text[0] == '-');
}

// digits, a point, an exponent of at most three digits
bool is_decimal(const std::string & text) {
    size_t i = 0;
    const auto digits = [&]() {
        const size_t from = i;
        while (i < text.size() && text[i] >= '0' && text[i] <= '9') {
            ++i;
        }
        return i - from;
    };

    size_t n = digits();
    if (i < text.size() && text[i] == '.') {
        ++i;
        n += digits();
    }
    if (n > 0 && i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
        ++i;
        if (i < text.size() && (text[i] == '+' || text[i] == '-')) {
            ++i;
        }
        const size_t n_exp = digits();
        if (n_exp < 1 || n_exp > 3) {
            return false;
        }
    }

    return n > 0 && i == text.size();
}

// whatever the program's locale takes for a decimal point
double to_double(const std::string & text) {
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());

    double value = 0.0;
    stream >> value;

    return stream.fail() ? std::copysign(INFINITY, value) : value;
}

int64_t whole(const std::string & name, const std::string & text) {
    if (!is_digits(text, is_signed(text), 18)) {
        throw text_error { name + " " + quoted(text) + " is not a whole number.", "write it like " + name + "=3." };
    }

    return strtoll(text.c_str(), nullptr, 10);
}

double real(const std::string & name, const std::string & text) {
    if (!is_decimal(text.substr(is_signed(text)))) {
        throw text_error { name + " " + quoted(text) + " is not a number.", "write it like " + name + "=0.5." };
    }

    return to_double(text);
}

int64_t within(const std::string & name, int64_t value, int64_t low, int64_t high, const std::string & remedy) {
    if (value < low || value > high) {
        throw text_error {
            format("%s %lld is not a whole number in the range %lld to %lld.", name.c_str(), (long long) value, (long long) low,
                (long long) high), remedy };
    }

    return value;
}

double within(const std::string & name, double value, double low, double high, const std::string & remedy) {
    if (!std::isfinite(value) || value < low || value > high) {
        throw text_error { name + " " + g(value) + " is not a number in the range " + g(low) + " to " + g(high) + ".", remedy };
    }

    return value;
}

//
// windows
//

struct window_t {
    int64_t first;
    int64_t last;
};

window_t to_window(const std::string & text) {
    const std::string like = "write it like 14:20, layers 14 to 19.";

    if (text.size() > 32) {
        throw text_error { "window " + quoted(text.substr(0, 16)) + "... is not of the form first:end.", like };
    }
    for (const char separator : { ':', '-' }) {
        const size_t at = text.find(separator);
        if (at == std::string::npos || !is_digits(text.substr(0, at), 0, 9) || !is_digits(text, at + 1, 9)) {
            continue;
        }
        const window_t w = { std::stoll(text.substr(0, at)), std::stoll(text.substr(at + 1)) };
        if (separator == ':') {
            return w;
        }
        const auto [a, b] = std::minmax(w.first, w.last);
        throw text_error { "window " + text + " is not of the form first:end.",
            format("windows are half-open: layers %lld to %lld are --window %lld:%lld.", (long long) a, (long long) b,
                (long long) a, (long long) b + 1) };
    }

    throw text_error { "window " + quoted(text) + " is not of the form first:end.", like };
}

void check_window(const window_t & w, int n_layer) {
    const std::string window = format("window %lld:%lld", (long long) w.first, (long long) w.last);

    if (w.first < 1) {
        throw text_error { window + " touches layer 0, which cannot be looped.", "start it at layer 1 or later." };
    }
    if (w.last <= w.first) {
        std::string remedy = "windows are half-open, first:end.";
        if (w.last >= 1 && w.last < w.first) {
            remedy += format(" Did you mean %lld:%lld?", (long long) w.last, (long long) w.first);
        }
        throw text_error { window + " is empty: its end must be greater than its start.", remedy };
    }
    if (n_layer <= 0) {
        return;
    }

    const std::string most = format("use 1:%d at most.", n_layer - 1);
    if (n_layer < 3) {
        throw text_error { format("a model of %d layers has no window to loop.", n_layer), "it needs at least 3 layers." };
    }
    if (w.last > n_layer) {
        throw text_error { format("%s is out of range: this model has %d layers.", window.c_str(), n_layer), most };
    }
    if (w.last == n_layer) {
        throw text_error {
            format("%s touches layer %d, the last one, which cannot be looped.", window.c_str(), n_layer - 1), most };
    }
}

//
// the whole text
//

struct settings_t {
    std::map<std::string, std::string> given;
    std::map<std::string, int64_t>     whole_numbers;
    std::map<std::string, double>      reals;

    bool has(const std::string & name) const {
        return given.count(name) > 0;
    }

    std::string word(const std::string & name, const std::string & otherwise) const {
        const auto it = given.find(name);
        return it == given.end() ? otherwise : it->second;
    }
};

words_t split(const std::string & text) {
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c < ' ' || c > '~' || c == '\'' || c == '"' || c == '\\') {
            throw text_error { format("a loop has no such character as its number %zu.", i + 1),
                "write it like '14:20 k=3 kv=each'." };
        }
    }
    if (text.size() > MAX_TEXT) {
        throw text_error { format("a loop of %zu characters is too long.", text.size()), "write it like '14:20 k=3 kv=each'." };
    }

    std::istringstream stream(text);
    words_t words;
    for (std::string word; stream >> word; ) {
        words.push_back(word);
    }

    return words;
}

settings_t read(const std::string & text, const words_t & words) {
    static const words_t WHOLE = { "k", "passes", "attention", "sinks" };
    static const words_t REAL  = { "damping", "beta", "mu", "halt" };

    if (words.empty() || words[0].find('=') != std::string::npos) {
        throw text_error { "loop " + quoted(text) + " does not start with a window.", "write it like '14:20 k=3 kv=each'." };
    }

    settings_t s;
    for (size_t i = 1; i < words.size(); ++i) {
        const size_t at = words[i].find('=');

        std::string name = words[i].substr(0, at);
        std::transform(name.begin(), name.end(), name.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c; });

        if (at == std::string::npos) {
            throw text_error { "loop setting " + quoted(words[i]) + " is not of the form name=value.", nearest(name, SETTINGS) };
        }
        if (std::find(SETTINGS.begin(), SETTINGS.end(), name) == SETTINGS.end()) {
            throw text_error { "loop setting " + quoted(name) + " is not known.", nearest(name, SETTINGS) };
        }
        if (s.has(name)) {
            throw text_error { "loop setting " + name + " is given twice.", "give it once." };
        }

        const std::string value = words[i].substr(at + 1);
        s.given[name] = value;
        if (std::find(WHOLE.begin(), WHOLE.end(), name) != WHOLE.end()) {
            s.whole_numbers[name] = whole(name, value);
        }
        if (std::find(REAL.begin(), REAL.end(), name) != REAL.end()) {
            s.reals[name] = real(name, value);
        }
    }
    if (!s.has("k")) {
        throw text_error { "loop " + quoted(text) + " has no k.", "write it like '14:20 k=3'." };
    }

    return s;
}

// which generated tokens loop: so many after a prompt, -1 for all, and those above an entropy, -1 for none
void to_decode(const std::string & text, llama_loop_spec & spec) {
    spec.decode_first   = -1;
    spec.decode_entropy = -1.0;

    const size_t      at    = text.find(':');
    const std::string head  = text.substr(0, at);
    const std::string value = at == std::string::npos ? "" : text.substr(at + 1);

    if (text == "full") {
        return;
    }
    if (text == "bypass") {
        spec.decode_first = 0;
        return;
    }
    if (head == "first" && is_digits(value, 0, 9) && std::stoi(value) >= 1) {
        spec.decode_first = std::stoi(value);
        return;
    }
    if (head == "entropy" && is_decimal(value) && std::isfinite(to_double(value))) {
        spec.decode_first   = 0;
        spec.decode_entropy = to_double(value);
        return;
    }

    throw text_error { "decode " + quoted(text) + " is not known.", nearest(text, DECODES) };
}

void parse(const std::string & text, int n_layer, llama_loop_spec & spec) {
    const words_t    words = split(text);
    const settings_t s     = read(text, words);
    const window_t   w     = to_window(words[0]);

    auto & params = spec.params;

    check_window(w, 0);
    params.mode = (int32_t) known("mode", s.word("mode", "block"), MODES);

    const std::string name = s.word("solver", "euler");
    const auto &      solver = llama_loop_solver_of(known("solver", name, llama_loop_solver_names()));

    const int k = within("K", s.whole_numbers.at("k"), 1, MAX_EVALS, "3 is a good start; 1 is the unmodified model.");
    const int n = k*solver.evaluations_per_step;
    if (n > MAX_EVALS) {
        throw text_error { format("K %d with solver %s needs %d evaluations, more than %d.", k, name.c_str(), n, (int) MAX_EVALS),
            format("use K %d at most.", (int) MAX_EVALS/solver.evaluations_per_step) };
    }

    const std::string kv = s.word("kv", name == "repeat" ? "each" : "first");
    params.kv = (int32_t) known("kv", kv, POLICIES);
    if (name == "repeat" && kv != "each") {
        throw text_error { "solver repeat cannot run with kv " + kv + ".", "it means naive with kv=each; use naive." };
    }

    double h = solver.undamped ? 1.0 : 1.0/k;
    if (s.has("damping")) {
        h = within("damping", s.reals.at("damping"), 0.0, 2.0, "leave it out for 1/K.");
        if (h == 0.0) {
            throw text_error { "damping 0 would leave the state as it is.", "give a damping above 0, or no loop." };
        }
        if (solver.undamped) {
            throw text_error { "solver " + name + " has no damping.", "leave out --damping; euler has one." };
        }
        if (n == 1 && h != 1.0) {
            throw text_error { "damping " + g(h) + " needs K 2 or more.", "K 1 is the unmodified model." };
        }
    }

    double beta = 0.0;
    if (s.has("beta")) {
        beta = within("beta", s.reals.at("beta"), 0.0, 1.0, "0 is no anchor, 0.5 a robust one.");
    }
    if (beta != 0.0 && name != "euler") {
        throw text_error { "beta " + g(beta) + " needs solver euler, not " + name + ".", "leave out --beta or --solver." };
    }

    double mu = 0.5;
    if (s.has("mu")) {
        mu = within("mu", s.reals.at("mu"), 0.0, 1.0, "leave it out for 0.5.");
        if (name != "heavy-ball" || mu == 1.0) {
            throw text_error { "mu " + g(mu) + " needs solver heavy-ball and a value below 1.", "leave out --mu." };
        }
    }

    int passes = 0;
    if (s.has("passes")) {
        passes = within("passes", s.whole_numbers.at("passes"), 2, MAX_EVALS, "use 3: it is the most exact.");
        if (name != "euler" || s.has("damping")) {
            throw text_error { "passes needs solver euler and its own damping 1/K.", "leave out --solver and --damping." };
        }
        if (3 < passes && passes < k) {
            throw text_error { format("passes %d is neither 2, 3 nor at least K %d.", passes, k), "use 3: it is the most exact." };
        }
    }

    to_decode(s.word("decode", "full"), spec);
    params.routing = (int32_t) known("routing", s.word("routing", params.mode == LLAMA_LOOP_MODE_LAYER ? "frozen" : "free"), ROUTINGS);

    params.attention = 0;
    if (s.has("attention")) {
        params.attention = within("attention", s.whole_numbers.at("attention"), 1, MAX_POS, "leave it out to see all.");
    }
    params.sinks = 0;
    if (s.has("sinks")) {
        params.sinks = within("sinks", s.whole_numbers.at("sinks"), 0, MAX_POS, "4 is usual, 0 keeps none.");
    }
    if (params.sinks > 0 && params.attention == 0) {
        throw text_error { format("sinks %d needs attention.", params.sinks), "say how many last positions stay visible too." };
    }

    params.halt = 0.0;
    if (s.has("halt")) {
        params.halt = within("halt", s.reals.at("halt"), 0.0, INFINITY, "leave it out to run all passes.");
        if (params.halt == 0.0) {
            throw text_error { "halt 0 would never stop a loop.", "give a residual above 0, or leave it out." };
        }
        if ((name != "euler" && name != "naive") || beta != 0.0 || passes > 0) {
            throw text_error { "halt " + g(params.halt) + " needs solver euler without beta and passes, or naive.",
                "leave out --solver, --beta and --passes." };
        }
        if (kv == "each") {
            throw text_error { "halt " + g(params.halt) + " cannot run with kv each.", "use kv first, last or frozen." };
        }
    }

    check_window(w, n_layer);

    const llama_loop_tableau t = passes > 0 && passes < k && beta < 1 ?
        llama_loop_reduce(k, beta, passes) : llama_loop_run(solver, k, h, name == "heavy-ball" ? mu : 0.0, beta);

    params.first  = w.first;
    params.last   = w.last;
    params.n_eval = t.B.size();
    for (size_t i = 0; i < t.B.size(); ++i) {
        std::copy(t.A[i].begin(), t.A[i].end(), spec.A + i*t.B.size());
    }
    std::copy(t.B.begin(), t.B.end(), spec.B);
}

} // namespace

int32_t llama_loop_parse(const char * text, int32_t n_layer, llama_loop_spec * spec) {
    try {
        memset(spec, 0, sizeof(*spec));
        parse(text, n_layer, *spec);
    } catch (const text_error & e) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_TEXT, e.what, e.remedy);
    }

    return LLAMA_LOOP_OK;
}

llama_loop_params llama_loop_spec_params(const llama_loop_spec * spec) {
    llama_loop_params params = spec->params;

    params.A = spec->A;
    params.B = spec->B;

    return params;
}
