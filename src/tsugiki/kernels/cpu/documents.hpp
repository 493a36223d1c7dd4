// Causal attention of documents that lie end to end: what bf16 in tiles (attend*.cpp) and fp32 in
// vectors (rows.cpp) are asked, how it falls into tasks, and how heads that share keys are summed.
//
// Each head of each document is one task, so results do not depend on threads. Knows no torch and no
// way to compute a task.

#pragma once

#include <algorithm>

#include "numbers.hpp"

namespace {

// Of a tensor: entry (head, token) begins at head · hs + token · ts.
template <class T>
struct Heads {
    const T* at;
    int64_t hs, ts;
    const T* row(int64_t head, int64_t token) const { return at + head * hs + token * ts; }
};

template <class T>
struct Asked {
    Heads<T> q, k, v;
    const int64_t* lengths;
    int64_t documents, heads, keys, d, tokens;  // keys: heads of keys and values
    float scale, cap;
    int64_t window;      // 0: none
    const float* sinks;  // a score per head that takes probability and gives nothing; or null

    // The first key that a query sees.
    int64_t first(int64_t query) const {
        return window ? std::max<int64_t>(0, query + 1 - window) : 0;
    }
};

template <class T>
struct Gradients {
    const T *out, *grad;  // (tokens, heads, d)
    const float* norms;   // what the way forth kept
    T *q, *k, *v;         // (tokens, heads, d), (tokens, keys, d) twice
    float *parts_k, *parts_v;  // (heads, tokens, d)
};

// One head of one document.
struct Task {
    int64_t head, key, start, length;
};

template <class T>
Task task_of(const Asked<T>& a, int64_t number) {
    int64_t document = number / a.heads, start = 0;
    for (int64_t i = 0; i < document; ++i) start += a.lengths[i];
    const int64_t head = number % a.heads;
    return {head, head / (a.heads / a.keys), start, a.lengths[document]};
}

template <class T>
int64_t longest(const Asked<T>& a, int64_t whole) {
    int64_t most = 0;
    for (int64_t i = 0; i < a.documents; ++i) most = std::max(most, a.lengths[i]);
    return up(most, whole);
}

// The heads that share keys, summed for one token.
template <class T>
void join(const Asked<T>& a, const float* parts, int64_t token, int64_t key, T* y) {
    const int64_t groups = a.heads / a.keys, d = a.d;
    const float* from = parts + (key * groups * a.tokens + token) * d;
    y += (token * a.keys + key) * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
        float sum = from[c];
        for (int64_t j = 1; j < groups; ++j) sum += from[j * a.tokens * d + c];
        put(y + c, sum);
    }
}

// All tasks back, one by `back(task, desk)`; a thread holds a Ready and its Desk. Whether there was
// memory.
template <class Ready, class Desk, class T, class Back>
bool all_back(const Asked<T>& a, const Gradients<T>& to, int64_t most, int threads, Back back) {
    bool whole = true;
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Ready ready;
        Desk desk(most, a.d);
        whole = desk.whole();
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < a.documents * a.heads; ++number)
            if (whole) back(task_of(a, number), desk);
#pragma omp for
        for (int64_t token = 0; token < a.tokens; ++token)
            for (int64_t key = 0; key < a.keys; ++key) {
                join(a, to.parts_k, token, key, to.k);
                join(a, to.parts_v, token, key, to.v);
            }
    }
    return whole;
}

}  // namespace

// What both ways are given, and how to read it. Strides in entries; q (heads, tokens, d), k and v
// (keys, tokens, d).
#define ATTENTION(T)                                                                              \
    const T *q, const T *k, const T *v, const int64_t *lengths, int64_t documents, int64_t heads, \
        int64_t keys, int64_t d, int64_t tokens, int64_t qh, int64_t qt, int64_t kh, int64_t kt,  \
        int64_t vh, int64_t vt, float scale, float cap, int64_t window, const float *sinks
#define THE_ATTENTION                                                                           \
    {                                                                                           \
        {q, qh, qt}, {k, kh, kt}, {v, vh, vt}, lengths, documents, heads, keys, d, tokens, scale, \
            cap, window, sinks                                                                  \
    }
