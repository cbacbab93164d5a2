"""Questions with protocols: what the package costs, and what it saves. See README.md."""
