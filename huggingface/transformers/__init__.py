"""What differs from upstream `transformers`, at upstream's paths.

Importing this package registers our names with upstream: the stream models with its Auto classes, and our attention functions
with its attention interface. It is the one import of the project with an effect.
"""

from .integrations import flash_attention
from .models import spec_stream

spec_stream.register()
flash_attention.register()
