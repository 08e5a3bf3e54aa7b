/* yolo_qc_plugin, AGPL-3.0
 *
 * The passes of fake quantization over memory, for FP32 on a CPU, those of annealed rounding (qat/annealed_rounding.py
 * has its formula), to codes, and over codes (qat/oscillation.py): native.py compiles this file and calls it.
 *
 * x has `rows` rows of `columns` values, each row with its own scale (and offset, where there are any). A code is
 * round((x - offset) / scale), half to even, clipped to low..high, with the offset brought to whole steps. No operation
 * may be contracted or reordered but the sums: values and gradients by x are those of PyTorch's separate operations, bit
 * for bit, but where an exponential function is in them.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Values that are summed in FP32, 32 kB of them; the sums are added in FP64, in one order whatever the threads. */
#define CHUNK 8192

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static float nearest_code(float v, float low, float high)
{
    float code = nearbyintf(v);
    code = code < low ? low : code; /* so written, NaN stays NaN */
    return code > high ? high : code;
}

/* The nearest whole number of steps for which the code of 0 is in the range. */
static float grid_offset(const float *offset, int64_t row, float scale, float low, float high)
{
    return offset ? nearest_code(offset[row] / scale, -high, -low) * scale : 0.0f;
}

/* e^x - 1, of x as near as [-87, 87] has it, to some units in the last place: 2^n * e^r - 1 with r in
 * [-ln(2) / 2, ln(2) / 2], by the series of e^r - 1. The C library has none for several values at once. */
static float exponential_less_1(float x)
{
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    float n = nearbyintf(x * 1.44269504f), r = (x - n * 0.693145752f) - n * 1.42860682e-6f, e = 1.0f / 5040, power;
    e = 1.0f / 720 + r * e;
    e = 1.0f / 120 + r * e;
    e = 1.0f / 24 + r * e;
    e = 1.0f / 6 + r * e;
    e = 0.5f + r * e;
    e = r + r * r * e;
    int32_t bits = ((int32_t)n + 127) << 23; /* of 2^n */
    memcpy(&power, &bits, sizeof power);
    return power * e + (power - 1.0f);
}

/* totals = factor * the sum of each row's chunks */
static void add_up(const double *sums, float *totals, int64_t rows, int64_t chunks, float factor)
{
    for (int64_t row = 0; row < rows; row++) {
        double sum = 0.0;
        for (int64_t k = row * chunks; k < (row + 1) * chunks; k++)
            sum += sums[k];
        totals[row] = (float)(sum * factor);
    }
}

/* out = the code */
void codes(const float *x, int8_t *out, int64_t rows, int64_t columns, const float *scale, float low, float high)
{
    for (int64_t row = 0; row < rows; row++) {
        float s = scale[row];
        for (int64_t i = row * columns; i < (row + 1) * columns; i++)
            out[i] = (int8_t)nearest_code(x[i] / s, low, high);
    }
}

/* out = code * scale + offset */
void fake_quantize(const float *x, float *out, int64_t rows, int64_t columns, const float *scale, const float *offset,
                   float low, float high, int threads)
{
    int64_t chunks = (columns + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < rows * chunks; k++) {
        int64_t row = k / chunks, start = row * columns + k % chunks * CHUNK;
        int64_t end = smaller(start + CHUNK, (row + 1) * columns);
        float s = scale[row], o = grid_offset(offset, row, s, low, high);
        for (int64_t i = start; i < end; i++) {
            out[i] = nearest_code((x[i] - o) / s, low, high) * s + o;
        }
    }
}

/* by_x = grad where the value is inside the grid, else 0; by_scale and by_offset, one sum per row, times `factor`.
 * With silu, x is what SiLU is taken of, and the value is SiLU's: by_x is by x all the same.
 * Returns 0, or 1 without memory for the sums. */
static int backward(const float *grad, const float *x, float *by_x, float *by_scale, float *by_offset, int64_t rows,
                    int64_t columns, const float *scale, const float *offset, float low, float high, float factor,
                    int threads, const int silu)
{
    int64_t chunks = (columns + CHUNK - 1) / CHUNK;
    double *sums = malloc(2 * rows * chunks * sizeof(double));
    if (!sums)
        return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < rows * chunks; k++) {
        int64_t row = k / chunks, start = row * columns + k % chunks * CHUNK;
        int64_t end = smaller(start + CHUNK, (row + 1) * columns);
        float s = scale[row], o = grid_offset(offset, row, s, low, high), sum = 0.0f, outside = 0.0f;
#pragma omp simd reduction(+ : sum, outside)
        for (int64_t i = start; i < end; i++) {
            float g = grad[i], value = x[i], slope = 1.0f;
            if (silu) {
                float sigmoid = 1.0f / (2.0f + exponential_less_1(-value));
                slope = sigmoid * (1.0f + value * (1.0f - sigmoid));
                value = value * sigmoid;
            }
            float v = (value - o) / s, code = nearest_code(v, low, high);
            int inside = (v > low) & (v < high);
            sum += g * (inside ? code - v : code);
            outside += inside ? 0.0f : g;
            by_x[i] = inside ? g * slope : 0.0f;
        }
        sums[k] = sum;
        sums[rows * chunks + k] = outside;
    }
    add_up(sums, by_scale, rows, chunks, factor);
    add_up(sums + rows * chunks, by_offset, rows, chunks, factor);
    free(sums);
    return 0;
}

int fake_quantize_backward(const float *grad, const float *x, float *by_x, float *by_scale, float *by_offset,
                           int64_t rows, int64_t columns, const float *scale, const float *offset, float low,
                           float high, float factor, int threads)
{
    return backward(grad, x, by_x, by_scale, by_offset, rows, columns, scale, offset, low, high, factor, threads, 0);
}

int fake_quantize_silu_backward(const float *grad, const float *u, float *by_u, float *by_scale, float *by_offset,
                                int64_t rows, int64_t columns, const float *scale, const float *offset, float low,
                                float high, float factor, int threads)
{
    return backward(grad, u, by_u, by_scale, by_offset, rows, columns, scale, offset, low, high, factor, threads, 1);
}

static float hyperbolic_tangent(float x)
{
    float e = exponential_less_1(2.0f * x);
    return e / (e + 2.0f);
}

/* out = scale * (floor(v) + h(v - floor(v))) of clipped positions v; `top` is the tanh at 1. */
void anneal(const float *weight, float *out, int64_t rows, int64_t columns, const float *scale, float low, float high,
            float temperature, float top)
{
    for (int64_t row = 0; row < rows; row++) {
        float s = scale[row];
        for (int64_t i = row * columns; i < (row + 1) * columns; i++) {
            float v = weight[i] / s;
            v = v < low ? low : v > high ? high : v;
            float lower = floorf(v), soft = hyperbolic_tangent((v - lower - 0.5f) / (2 * temperature));
            out[i] = (lower + soft / (2 * top) + 0.5f) * s;
        }
    }
}

/* by_weight = grad * h', 0 where the weight is clipped; by_scale, one sum per row, times `factor`.
 * Returns 0, or 1 without memory for the sums. */
int anneal_backward(const float *grad, const float *weight, float *by_weight, float *by_scale, int64_t rows,
                    int64_t columns, const float *scale, float low, float high, float temperature, float top,
                    float factor)
{
    int64_t chunks = (columns + CHUNK - 1) / CHUNK;
    double *sums = malloc(rows * chunks * sizeof(double));
    if (!sums)
        return 1;
    for (int64_t k = 0; k < rows * chunks; k++) {
        int64_t row = k / chunks, start = row * columns + k % chunks * CHUNK;
        int64_t end = smaller(start + CHUNK, (row + 1) * columns);
        float s = scale[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; i++) {
            float position = weight[i] / s, v = position < low ? low : position > high ? high : position;
            float lower = floorf(v), soft = hyperbolic_tangent((v - lower - 0.5f) / (2 * temperature));
            float slope = v == position ? (1.0f - soft * soft) / (4 * temperature * top) : 0.0f;
            by_weight[i] = grad[i] * slope;
            sum += grad[i] * (lower + soft / (2 * top) + 0.5f) - position * by_weight[i];
        }
        sums[k] = sum;
    }
    add_up(sums, by_scale, rows, chunks, factor);
    free(sums);
    return 0;
}

/* What a step of oscillation does to each weight, with keep = 1 - momentum; for each layer, how many codes have changed,
 * and how many weights oscillate. */
void oscillate(const int8_t *now, int8_t *before, int8_t *change, int8_t *direction, float *frequency,
               const int64_t *sizes, int64_t layers, float keep, float momentum, float threshold, int64_t *flipped,
               int64_t *oscillating)
{
    int64_t i = 0;
    for (int64_t layer = 0; layer < layers; layer++) {
        int64_t end = i + sizes[layer], flips = 0, above = 0;
        for (; i < end; i++) {
            int8_t sign = (now[i] > before[i]) - (now[i] < before[i]);
            frequency[i] = frequency[i] * keep + (sign * direction[i] < 0 ? momentum : 0.0f);
            direction[i] = sign ? sign : direction[i];
            before[i] = now[i];
            change[i] = sign;
            flips += sign != 0;
            above += frequency[i] > threshold;
        }
        flipped[layer] = flips;
        oscillating[layer] = above;
    }
}
