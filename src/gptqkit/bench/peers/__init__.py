"""Drivers of other tools for `gptqkit bench quality`: one script each, run by the interpreter of that tool's own environment.

    PYTHON peer_NAME.py MODEL OUT IDS.json BITS GROUP_SIZE SEED DEVICE

IDS.json holds the calibration as a list of lists of token ids, all of one length. A driver quantizes every linear of MODEL but the output
head, symmetric if the tool can, with the tool's default options for everything that is not an argument, and saves a checkpoint in OUT. A
tool whose values no checkpoint format of ours holds saves them as plain weights, with OUT/dequantized.json saying how many linears they
are of and how many bits a weight takes in the tool's own format.

The scripts import nothing of gptqkit, which is not in their environment, and nothing imports them. Their imports are inside `main`, so
that the files can be read by tools that collect tests and documentation.
"""
