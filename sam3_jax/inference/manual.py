"""What ``infer.py --help`` says around its list of arguments."""

USAGE = """
  %(prog)s --checkpoint DIR --input FILE... --prompt TEXT... --output DIR
  %(prog)s --checkpoint DIR --input FILE... --box x0,y0,x1,y1[,+|-]... [--prompt ...] --output DIR
  %(prog)s --checkpoint DIR --input FILE --point x,y[,+|-]... --output DIR
  %(prog)s --checkpoint DIR --input FILE... --everything --output DIR
  %(prog)s --checkpoint DIR --input VIDEO... --prompt TEXT... --output DIR
  %(prog)s --checkpoint DIR --video --input FOLDER_OF_FRAMES... --prompt TEXT... --output DIR
  %(prog)s --checkpoint DIR --jobs FILE.jsonl --output DIR
  %(prog)s --merge --output DIR
  %(prog)s --checkpoint DIR --export DIR
  %(prog)s --input FILE... --prompt "red ring" --output DIR   (the demonstration weights)"""

DESCRIPTION = """\
Find every instance of a concept in pictures: a phrase, example boxes, or both. Or segment one
object by points, a box or a mask; or everything there is. In videos the same is followed from frame
to frame, every object with a number of its own, in memory that does not grow with the length.

OUTPUT/results.json holds all masks in COCO format (run-length encoded, with boxes and scores);
OUTPUT/NAME_overlay.png shows them. Of a video OUTPUT/NAME_tracks.json has the masks of every object
in every frame (YouTube-VIS layout), NAME_overlay.mp4 and NAME_sheet.jpg show them. What cannot be
read is reported and skipped. A run that was stopped, or killed, goes on where it was when the same
command is given again: with the next picture or video."""

EXAMPLES = """\
examples:
  one picture, one phrase:
    %(prog)s --checkpoint sam3_jax_ckpt --input photo.jpg --prompt "cat" --output out
  a folder with all its folders, two phrases, surer instances only:
    %(prog)s --checkpoint sam3_jax_ckpt --input photos/ --recursive \\
        --prompt "red car" "traffic light" --threshold 0.6 --output out
  everything that looks like the thing in this box (pixels x0,y0,x1,y1):
    %(prog)s --checkpoint sam3_jax_ckpt --input shelf.jpg --box 120,80,260,310 --output out
  a phrase, but not what is in this box:
    %(prog)s --checkpoint sam3_jax_ckpt --input shelf.jpg --prompt "bottle" \\
        --box 400,90,520,330,- --output out
  one object, by a click on it and one beside it:
    %(prog)s --checkpoint sam3_jax_ckpt --input photo.jpg --point 320,240 --point 500,90,- \\
        --output out
  masks for annotation tools, no pictures, ten at a time:
    %(prog)s --checkpoint sam3_jax_ckpt --input 'data/**/*.jpg' --prompt "person" \\
        --labelme --yolo --no-overlay --batch-size 10 --output out
  small things in a huge picture:
    %(prog)s --checkpoint sam3_jax_ckpt --input aerial.tif --prompt "car" --tile 1500 --output out
  a video, two phrases in one pass:
    %(prog)s --checkpoint sam3_jax_ckpt --input clip.mp4 --prompt "red car" "person" --output out
  one object through a video, clicked on in frame 40:
    %(prog)s --checkpoint sam3_jax_ckpt --input clip.mp4 --point 320,240 --at 40 --output out
  a folder of frames, every second one of the first thousand:
    %(prog)s --checkpoint sam3_jax_ckpt --video --input frames/ --fps 30 --frames :1000:2 \\
        --prompt "dog" --output out
  four machines that share the disk (then once: %(prog)s --merge --output out):
    %(prog)s ... --shard 0/4 --output out      %(prog)s ... --shard 1/4 --output out      ...

Different prompts for every picture: --jobs FILE, one JSON object a line, for example
    {"image": "a.jpg", "phrases": ["cat"], "boxes": [[9, 8, 60, 90]], "threshold": 0.4}
    {"image": "b.jpg", "points": [[320, 200]]}
    {"image": "clip.mp4", "object_box": [30, 20, 400, 300], "frame": 12}
(all keys: docs/inference.md). Videos have a page of their own: docs/video.md.

The first picture takes longer: the model is compiled for this machine, and kept in
~/.cache/sam3_jax for the next time (SAM3_JAX_CACHE_DIR=DIR moves it, =off disables it).

exit status: 0 all done, 1 some pictures or videos failed (the results say why), 2 could not start,
130 interrupted."""
