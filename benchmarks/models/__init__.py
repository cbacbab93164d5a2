"""Which public models train by windows as they are, with a wrapper, or not at all?"""
