/* Decodes a rectangle of a JPEG image to RGB: tjDecompress2's pixels, but no more of them than are wanted.
 *
 * Rows below the rectangle are not read; those above it and columns beside it go through the Huffman decoder alone, as
 * what follows them depends on it. Of a pair of random crops of at least a fifth of the image that saves a tenth of
 * the time. Needs libjpeg-turbo; callable from many threads.
 */
#include <Python.h>

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#define ROWS 16 /* asked for at a time */
/* Of a progressive image, each of whose scans goes over all of it, and may take but a few bytes: as in limits.py. */
#define MOST_SCANS 100
#define MOST_SCANNED (UINT64_C(1) << 31) /* pixels, over all scans */

typedef struct {
    struct jpeg_error_mgr errors; /* first: libjpeg hands out its address */
    struct jpeg_progress_mgr progress;
    jmp_buf failed;
} decoder;

static void fail(j_common_ptr info) { longjmp(((decoder *)info->err)->failed, 1); }

static void limit_scans(j_common_ptr common) {
    j_decompress_ptr info = (j_decompress_ptr)common;
    uint64_t scans = (uint64_t)info->input_scan_number;
    if (scans > MOST_SCANS || scans * info->image_width * info->image_height > MOST_SCANNED) fail(common);
}

static void refuse_warnings(j_common_ptr info, int level) {
    if (level < 0) fail(info);
}

/* Writes rows top..top+height, columns left..left+width of the JPEG image at `data` to `out`: RGB, 3 * width bytes a row.
 * Colors in the first and last column may differ from the whole image's, where they are not its own edge: libjpeg has
 * no neighbor there to interpolate with; so may all those of less than 5 columns of a wider image, which it does not
 * interpolate. Fastest where `left` is a multiple of 16, as blocks begin there.
 * Returns 0, or 1 where the image is not one of image_height by image_width, or anything about it is not in order. */
int decode_rectangle(const uint8_t *data, size_t size, int image_height, int image_width, int top, int left, int height,
                     int width, uint8_t *out) {
    struct jpeg_decompress_struct info;
    decoder d;
    uint8_t *volatile line = NULL;
    volatile int status = 1;

    memset(&info, 0, sizeof info);
    info.err = jpeg_std_error(&d.errors);
    d.errors.error_exit = fail;
    d.errors.emit_message = refuse_warnings;
    if (setjmp(d.failed)) goto end;
    jpeg_create_decompress(&info);
    d.progress.progress_monitor = limit_scans;
    info.progress = &d.progress;
    jpeg_mem_src(&info, data, size);
    jpeg_read_header(&info, TRUE);
    if ((int)info.image_height != image_height || (int)info.image_width != image_width) goto end;
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);

    JDIMENSION first = (JDIMENSION)left, columns = (JDIMENSION)width;
    jpeg_crop_scanline(&info, &first, &columns); /* moves `first` to where a block begins */
    size_t before = 3 * ((size_t)left - first), row = 3 * (size_t)width;
    if (before && !(line = malloc(before + row))) goto end;
    if (top > 0) jpeg_skip_scanlines(&info, (JDIMENSION)top);
    for (int done = 0; done < height;) {
        JSAMPROW rows[ROWS];
        int wanted = line ? 1 : height - done < ROWS ? height - done : ROWS;
        for (int i = 0; i < wanted; i++) rows[i] = line ? line : out + row * (size_t)(done + i);
        int got = (int)jpeg_read_scanlines(&info, rows, (JDIMENSION)wanted);
        if (line && got) memcpy(out + row * (size_t)done, line + before, row);
        done += got;
    }
    if (top + height == image_height) jpeg_finish_decompress(&info); /* reads on to the end: warns where it is missing */
    status = 0;
end:
    jpeg_destroy_decompress(&info);
    free(line);
    return status;
}

/* An empty module: how compiled code finds the file that holds the function. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_jpeg", .m_size = -1};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModule_Create(&module); }
