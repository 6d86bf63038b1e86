"""Experiments with real speech; needs the extra `demo`."""

import logging

# What transformers sets off by importing torchao, where that is installed, although nothing here is quantised.
for _logger, _message in (("torchao", "Failed to load "), ("torch.utils._pytree", "is an Enum subclass and is now")):
    logging.getLogger(_logger).addFilter(lambda record, message=_message: message not in record.getMessage())
