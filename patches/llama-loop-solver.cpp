// A solver is an update rule in the values of f(x) = g(x) - x. It is run here on vectors of coefficients of f(y_1),
// f(y_2), ..., with x_0 as the zero vector, and what it leaves is the tableau.

#include "llama-loop-solver.h"

using vec = llama_loop_vec;

vec vec::operator+(const vec & o) const {
    vec res = *this;
    for (size_t i = 0; i < c.size(); ++i) {
        res.c[i] += o.c[i];
    }
    return res;
}

vec vec::operator-(const vec & o) const {
    return *this + -1.0*o;
}

namespace {

using f_t    = std::function<vec(const vec &)>;

vec euler(const f_t & f, vec x, int k, double h, double) {
    for (int i = 0; i < k; ++i) {
        x = x + h*f(x);
    }
    return x;
}

vec midpoint(const f_t & f, vec x, int k, double h, double) {
    for (int i = 0; i < k; ++i) {
        x = x + h*f(x + h/2*f(x));
    }
    return x;
}

vec heun(const f_t & f, vec x, int k, double h, double) {
    for (int i = 0; i < k; ++i) {
        const vec f1 = f(x);
        const vec f2 = f(x + h*f1);
        x = x + h/2*(f1 + f2);
    }
    return x;
}

vec rk4(const f_t & f, vec x, int k, double h, double) {
    for (int i = 0; i < k; ++i) {
        const vec f1 = f(x);
        const vec f2 = f(x + h/2*f1);
        const vec f3 = f(x + h/2*f2);
        const vec f4 = f(x + h*f3);
        x = x + h/6*(f1 + 2.0*f2 + 2.0*f3 + f4);
    }
    return x;
}

vec input_anchor(const f_t & f, vec x, int k, double h, double) {
    const vec x0 = x;
    for (int i = 0; i < k; ++i) {
        x = h*(x + f(x)) + (1 - h)*x0;
    }
    return x;
}

vec heavy_ball(const f_t & f, vec x, int k, double h, double mu) {
    vec before = x;
    for (int i = 0; i < k; ++i) {
        const vec next = x + h*f(x) + mu*(x - before);
        before = x;
        x      = next;
    }
    return x;
}

// arXiv 2602.14759: the mean of g(x), g(g(x)), ...
vec average(const f_t & f, vec x, int k, double h, double) {
    vec total = 0.0*x;
    for (int i = 0; i < k; ++i) {
        x     = x + h*f(x);
        total = total + x;
    }
    return 1.0/k*total;
}

const llama_loop_solver SOLVERS[] = {
    { euler, 1, false }, { euler, 1, true }, { euler, 1, true }, { midpoint, 2, false }, { heun, 2, false }, { rk4, 4, false },
    { input_anchor, 1, false }, { heavy_ball, 1, false }, { average, 1, true },
};

} // namespace

const std::vector<std::string> & llama_loop_solver_names() {
    static const std::vector<std::string> names = {
        "euler", "naive", "repeat", "midpoint", "heun", "rk4", "input-anchor", "heavy-ball", "average",
    };
    return names;
}

const llama_loop_solver & llama_loop_solver_of(size_t index) {
    return SOLVERS[index];
}

llama_loop_tableau llama_loop_run(const llama_loop_solver & solver, int k, double h, double mu, double beta) {
    const int n = k*solver.evaluations_per_step;

    llama_loop_tableau t;
    const auto f = [&](const vec & y) {
        vec unit = { std::vector<double>(n, 0.0) };
        unit.c[t.A.size()] = 1.0;
        t.A.push_back(y.c);
        return unit;
    };

    const vec y = solver.rule(f, { std::vector<double>(n, 0.0) }, k, h, mu);

    vec unit = { std::vector<double>(n, 0.0) };
    unit.c[0] = 1.0;
    t.B = ((1 - beta)*y + beta*unit).c;

    // evaluations at the end whose result nothing uses
    while (t.B.size() > 1 && t.B.back() == 0.0) {
        t.B.pop_back();
        t.A.pop_back();
    }
    for (auto & row : t.A) {
        row.resize(t.B.size());
    }

    return t;
}

// K anchored Euler steps in two or three evaluations with the same elementary weights: reduced() of ggufloop/solvers.py
llama_loop_tableau llama_loop_reduce(int k, double beta, int passes) {
    const double s     = 1 - beta;
    const double gamma = s*(k - 1)/(2*k);
    const double delta = s*(k - 1)*(2*k - 1)/(6*k*k);
    const double eps   = s*(k - 1)*(k - 2)/(6*k*k);

    if (passes == 2) {
        const double c2 = (double) (2*k - 1)/(3*k);
        const double b2 = gamma/c2;
        return { { { 0.0, 0.0 }, { c2, 0.0 } }, { 1 - b2, b2 } };
    }

    const double c2  = 1.0/3;
    const double c3  = 2.0/3;
    const double b3  = (delta - gamma*c2)/(c3*(c3 - c2));
    const double b2  = (gamma - b3*c3)/c2;
    const double a32 = eps/(b3*c2);
    return { { { 0.0, 0.0, 0.0 }, { c2, 0.0, 0.0 }, { c3 - a32, a32, 0.0 } }, { 1 - b2 - b3, b2, b3 } };
}
