#pragma once

// Solvers of a loop's text: an update rule makes the tableau that a plan runs, see llama-loop.h.

#include <functional>
#include <string>
#include <vector>

struct llama_loop_vec {
    std::vector<double> c;

    llama_loop_vec operator+(const llama_loop_vec & o) const;
    llama_loop_vec operator-(const llama_loop_vec & o) const;

    friend llama_loop_vec operator*(double s, llama_loop_vec v) {
        for (auto & x : v.c) {
            x *= s;
        }
        return v;
    }
};

struct llama_loop_solver {
    llama_loop_vec (*rule)(const std::function<llama_loop_vec(const llama_loop_vec &)> & f, llama_loop_vec x, int k, double h, double mu);

    int  evaluations_per_step;
    bool undamped;
};

struct llama_loop_tableau {
    std::vector<std::vector<double>> A;
    std::vector<double>              B;
};

const std::vector<std::string> & llama_loop_solver_names();
const llama_loop_solver        & llama_loop_solver_of(size_t index);

llama_loop_tableau llama_loop_run(const llama_loop_solver & solver, int k, double h, double mu, double beta);

// k anchored Euler steps in two or three evaluations
llama_loop_tableau llama_loop_reduce(int k, double beta, int passes);
