"""What differs from upstream `transformers`, at upstream's paths.

Importing this package registers our names with upstream: the stream models with its Auto classes, our attention functions
with its attention interface, and our packed weights with its quantisers. It is the one import of the project with an effect.
"""

from .integrations import flash_attention
from .models import spec_stream
from .quantizers import quantizer

spec_stream.register()
flash_attention.register()
quantizer.register()
