"""What decoders and vision encoders of other libraries look like, family by family.

Where their attention, linears and norms are, how keys and values of prompts are made there, and
the check that all of it is as the method needs it. A new family is made to fit here.
"""
