"""Images, prompt templates and the processor: from conversations to model inputs."""
