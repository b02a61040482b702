"""The notebook side: magics, views, and the bridge to the kernel. Nobody else imports it."""
