/* yolo_qc_plugin, AGPL-3.0
 *
 * The two passes of fake quantization over memory, for FP32 on a CPU: native.py compiles this file and calls it.
 *
 * x has `rows` rows of `columns` values, each row with its own scale (and offset, where there are any). A code is
 * round((x - offset) / scale), half to even, clipped to low..high, with the offset brought to whole steps. No operation
 * may be contracted or reordered but the sums: values and gradients by x are those of PyTorch's separate operations, bit
 * for bit.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

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
 * Returns 0, or 1 without memory for the sums. */
int fake_quantize_backward(const float *grad, const float *x, float *by_x, float *by_scale, float *by_offset,
                           int64_t rows, int64_t columns, const float *scale, const float *offset, float low,
                           float high, float factor, int threads)
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
            float g = grad[i], v = (x[i] - o) / s, code = nearest_code(v, low, high);
            int inside = (v > low) & (v < high);
            sum += g * (inside ? code - v : code);
            outside += inside ? 0.0f : g;
            by_x[i] = inside ? g : 0.0f;
        }
        sums[2 * k] = sum;
        sums[2 * k + 1] = outside;
    }
    for (int64_t row = 0; row < rows; row++) {
        double sum = 0.0, outside = 0.0;
        for (int64_t k = row * chunks; k < (row + 1) * chunks; k++) {
            sum += sums[2 * k];
            outside += sums[2 * k + 1];
        }
        by_scale[row] = (float)(sum * factor);
        by_offset[row] = (float)(outside * factor);
    }
    free(sums);
    return 0;
}
