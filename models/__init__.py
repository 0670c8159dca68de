"""Model families: one file each, a forward pass that reads top to bottom.

The shape key, declared once. Device arrays of rank two or more end in their letters (`x_TD`):

    T  tokens in the step         D  model width              L  layers
    R  decode rows in the step    F  output width of a matrix P  pages in the pool
    C  prefill chunks in the step N  query heads              S  slots (tokens) in a page
    B  rows that sample (R + C)   K  key/value heads          W  pages in a block table
    V  vocabulary                 G  N // K                   H  head width

Weights are [output, input], as checkpoints store them. Host arrays and lists carry no suffix.
"""
